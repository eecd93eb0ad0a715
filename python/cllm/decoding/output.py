"""What `generate` returns when it is asked for more than token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from ..trajectory import Trajectory
from .loop import DecodingLoop


@dataclass
class JacobiOutput(ModelOutput):
    """Result of Jacobi decoding with ``return_dict_in_generate=True``.

    Attributes:
        sequences: [B, P + T] int64 token ids, the prompt included, padded after each row's end.
        iterations: [B] int64, the forward passes that each row took part in before it ended.
        accepted: [B] int64, the tokens that each row generated.
        forwards: forward passes of the whole call, the prefill apart.
        tokens_per_forward: tokens that a row gains per forward pass it takes part in, over all
            rows; every forward counts except the prefill.
        prefill_seconds: wall-clock seconds of the prefill (on a GPU: until it was launched).
        decode_seconds: wall-clock seconds of the decoding loop.
        block_size, verify_size: of the windows, chosen ones too; no verify size where no adapter
            made the guesses.
        trajectories: one per row if ``record_trajectories`` was set, else None.
    """

    sequences: torch.Tensor | None = None
    iterations: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    forwards: int | None = None
    tokens_per_forward: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    trajectories: list[Trajectory] | None = None
    block_size: int | None = None
    verify_size: int | None = None


def output_of(
    loop: DecodingLoop,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    pad_token_id: int,
    prefill_seconds: float,
    whole: bool | None,
) -> torch.Tensor | JacobiOutput:
    """What a call returns once its loop has ended.

    Args:
        prompts, lengths: [B, P], right-padded, and [B].
        whole: a `JacobiOutput`, not its sequences alone.
    """
    ends = torch.tensor([row.generated for row in loop.rows], device=prompts.device)
    sequences = loop.state.sequences[:, : int(ends.max())]
    columns = torch.arange(sequences.shape[1], device=sequences.device)
    # a stop string may have cut tokens that were committed already
    sequences = sequences.masked_fill(columns >= ends[:, None], pad_token_id)
    if not whole:
        return sequences
    iterations = torch.tensor([row.iterations for row in loop.rows], device="cpu")
    accepted = ends.cpu() - loop.prompt_width
    trajectories = None
    if loop.config.record_trajectories:
        rows = zip(prompts.tolist(), lengths.tolist(), strict=True)
        trajectories = loop.trajectories([prompt[:length] for prompt, length in rows])
    return JacobiOutput(
        sequences=sequences,
        iterations=iterations,
        accepted=accepted,
        forwards=loop.forwards,
        tokens_per_forward=float(accepted.sum() / iterations.sum().clamp(min=1)),
        prefill_seconds=prefill_seconds,
        decode_seconds=loop.seconds,
        trajectories=trajectories,
        block_size=loop.config.width,
        verify_size=loop.iteration.verify,
    )
