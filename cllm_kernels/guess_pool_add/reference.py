"""guess_pool_add in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def guess_pool_add(
    latest: Tensor,  # [B, V], mutated
    stamps: Tensor,  # [B], mutated
    window: Tensor,  # [B, n]
    predictions: Tensor,  # [B, n]
) -> None:
    """All rows at once; the maximum makes the order of writing not matter."""
    vocabulary, n = latest.shape[1], window.shape[1]
    places = stamps[:, None] + torch.arange(n, device=window.device)
    last = vocabulary - 1
    inside = (window == window.clamp(0, last)) & (predictions == predictions.clamp(0, last))
    pairs = (places * vocabulary + predictions).masked_fill(~inside, -1)
    latest.scatter_reduce_(1, window.clamp(0, last), pairs, "amax")
    stamps += n
