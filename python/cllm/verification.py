"""How far generated tokens are from the argmax of one full forward: `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .decoding.support import check_model, model_device


@dataclass(frozen=True)
class Verification:
    """Every generated token against one full forward over its own sequence.

    Attributes:
        gap: [B, T] float32, the largest logit minus the token's logit; 0 where the token is the
            argmax, NaN at padding after a row's end.
        argmax: [B, T] int64, the full forward's choice given the same prefix.
        tolerance: the largest gap that counts as a near-tie.
        exact, near_tie, wrong: token counts: the argmax itself; within `tolerance` of it, where
            the rounding of a forward of another width decides; and beyond it.
    """

    gap: torch.Tensor
    argmax: torch.Tensor
    tolerance: float
    exact: int
    near_tie: int
    wrong: int

    @property
    def ok(self) -> bool:
        """No token is wrong."""
        return self.wrong == 0

    def near_ties(self) -> list[tuple[int, int, float]]:
        """(row, index in the generated text, gap) of every token that is not the argmax."""
        differing = (self.gap > 0).nonzero().tolist()
        return [(row, index, float(self.gap[row, index])) for row, index in differing]

    def summary(self) -> str:
        """One line for people."""
        total = self.exact + self.near_tie + self.wrong
        line = f"{total} tokens: {self.exact} exact, {self.near_tie} near-tie, {self.wrong} wrong"
        gaps = [gap for _, _, gap in self.near_ties()]
        if gaps:
            line += f" (largest logit gap {max(gaps):.3g}, tolerance {self.tolerance:.3g})"
        return line


# Largest difference that a logit shows between a one-row and an n-row forward: 0.52 was seen in
# bf16 on SmolLM2-135M (logits of magnitude 10 to 30); both sides of a tie can move.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}


def near_tie_tolerance(dtype: torch.dtype) -> float:
    """The largest logit gap that counts as a near-tie in a model of this dtype."""
    return _TOLERANCE.get(dtype, 1e-3)


@torch.no_grad()
def verify(
    model: Any,
    sequences: torch.Tensor,
    prompt_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compare generated tokens with the argmax of one forward over the whole sequence.

    The comparison is with greedy search without logits processors. In fp32 every token should be
    exact; in bf16 and fp16 forwards of different width round differently, and this says by how
    much the choice was off where a near-tie flipped.

    Args:
        model: the model in eval mode.
        sequences: [B, P + T] int64, as `generate` returns them.
        prompt_length: P, the (padded) prompt's columns.
        attention_mask: [B, P] of the left-padded prompts; None: no padding.
        tolerance: largest logit gap of a near-tie; by default 1e-3 in fp32, 0.25 in fp16 and 1.0
            in bf16.

    Raises:
        ValueError: if `prompt_length` leaves no prompt or exceeds the sequence.
    """
    check_model(model)
    if sequences.dim() != 2:
        raise ValueError(f"sequences must be [batch, tokens], not {list(sequences.shape)}")
    if not 1 <= prompt_length <= sequences.shape[1]:
        raise ValueError(
            f"prompt_length={prompt_length} must lie between 1 and the {sequences.shape[1]} "
            "columns of sequences"
        )
    if attention_mask is not None and attention_mask.shape != sequences[:, :prompt_length].shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, the prompts "
            f"{[sequences.shape[0], prompt_length]}; they must be alike"
        )
    if tolerance is None:
        tolerance = near_tie_tolerance(model.dtype)
    ended = _after_the_end(model, sequences, prompt_length)
    gaps, choices = [], []
    for row in range(sequences.shape[0]):
        start = 0
        if attention_mask is not None:
            start = prompt_length - int(attention_mask[row].sum())
        tokens = sequences[row, start:].to(model_device(model))
        # one row at a time: no padding, so no other row's width enters the rounding
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        logits = logits[prompt_length - start - 1 : -1].float()
        generated = tokens[prompt_length - start :]
        best, choice = logits.max(dim=-1)
        gaps.append((best - logits.gather(1, generated[:, None])[:, 0]).cpu())
        choices.append(choice.cpu())
    gap = torch.stack(gaps).masked_fill(ended, float("nan"))
    return Verification(
        gap=gap,
        argmax=torch.stack(choices),
        tolerance=tolerance,
        exact=int((gap == 0).sum()),
        near_tie=int(((gap > 0) & (gap <= tolerance)).sum()),
        wrong=int((gap > tolerance).sum()),
    )


def _after_the_end(model: Any, sequences: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """[B, T] True behind each row's first end-of-text token."""
    generated = sequences[:, prompt_length:].cpu()
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return torch.zeros_like(generated, dtype=torch.bool)
    stops = torch.isin(generated, torch.as_tensor(ends).flatten())
    return stops.long().cumsum(dim=1) - stops.long() > 0
