"""row_argmax in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

from torch import Tensor


def row_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., V] -> (index [...] int64, value [...] of the logits' dtype)."""
    # torch.argmax takes the first of equal elements, and the first NaN before all others.
    index = logits.argmax(dim=-1)
    value = logits.gather(-1, index[..., None])[..., 0]
    return index, value
