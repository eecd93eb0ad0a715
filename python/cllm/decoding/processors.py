"""Logits processors inside a window: each position sees the prefix it would see one token at a
time."""

from __future__ import annotations

from collections.abc import Callable

import torch


def processed_argmax(
    processors: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    window: torch.Tensor,
    sequences: torch.Tensor,
    starts: list[int],
) -> torch.Tensor:
    """Predictions after logits processors.

    Position i of row b is scored behind the prefix ``sequences[b, :starts[b]] + window[b, 1:i+1]``.
    Where the guesses in it are right, that is the very prefix of one-token decoding, so the
    prediction is too; where they are wrong, the prediction is a guess in any case.

    Rows stand at different lengths while a processor takes one rectangle, so rows of equal length
    go together, each in its own place in the batch (some processors index by row), and the other
    places hold a copy.

    Args:
        logits: [B, n, V].
        window: [B, n] int64.
        sequences: [B, L] int64, padded prompts and committed tokens.
        starts: per row, the tokens of `sequences` up to and including ``window[b, 0]``.

    Returns:
        [B, n] int64.
    """
    batch, width, _ = logits.shape
    predictions = torch.empty_like(window)
    for start in sorted(set(starts)):
        rows = [row for row in range(batch) if starts[row] == start]
        members = torch.tensor(rows, device=window.device)
        source = torch.full((batch,), rows[0], device=window.device)
        source[members] = members
        prefix = torch.cat([sequences[source, :start], window[source, 1:]], dim=1)
        for offset in range(width):
            scores = logits[source, offset].to(torch.float32, copy=True)
            scores = processors(prefix[:, : start + offset], scores)
            predictions[members, offset] = scores.argmax(dim=-1)[members]
    return predictions
