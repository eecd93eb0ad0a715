"""Guesses for positions that no forward pass has predicted yet."""

from __future__ import annotations

from typing import Literal

import torch

Fill = Literal["prompt", "last", "random", "pad"]


def fill_table(
    fill: Fill,
    *,
    prompts: torch.Tensor,
    prompt_lengths: torch.Tensor,
    prompt_width: int,
    width: int,
    seed: int,
    vocab_size: int,
    pad_token_id: int,
) -> torch.Tensor | None:
    """The guess for every column of the output, [B, width] int64, or None for "last".

    A row's guesses depend on the seed, the position in the row (padding not counted) and the row's
    own prompt only, so that a row takes the same iterations alone and in a batch.

    Args:
        prompts: [B, P] right-padded prompts, `prompt_lengths` [B] their true lengths.
        prompt_width: columns of the (left-padded) prompts in the output.
        width: columns to cover.
    """
    if fill == "last":
        return None
    batch, device = prompts.shape[0], prompts.device
    if fill == "pad":
        return torch.full((batch, width), pad_token_id, dtype=torch.long, device=device)
    # drawn on the CPU: generators of different devices give different numbers
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.rand(width, generator=generator, dtype=torch.float64, device="cpu").to(device)
    padding = (prompt_width - prompt_lengths)[:, None]
    draws = draws[(torch.arange(width, device=device) - padding).clamp(min=0)]
    if fill == "random":
        return (draws * vocab_size).long()
    return prompts.gather(1, (draws * prompt_lengths[:, None]).long())
