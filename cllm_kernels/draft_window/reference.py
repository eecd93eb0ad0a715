"""draft_window in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def draft_window(
    window: Tensor,  # [B, n], written
    checked: Tensor,  # [B, v]
    guesses: Tensor,  # [B, n]
    accepted: Tensor,  # [B]
    generated: Tensor,  # [B]
    progress: Tensor | None,  # [B]
    fill: Tensor | None,  # [B, F]
) -> None:
    """All rows at once; only shapes decide what runs, and nothing is read back to the host."""
    slot = torch.arange(guesses.shape[1], device=guesses.device)
    if progress is not None:
        exact = progress[:, None]
        unfinished = (exact > 0) & (slot > exact)
        window.copy_(torch.where(unfinished, guesses.roll(1, dims=1), checked))
        return
    last = guesses.shape[1] - 1
    source = accepted[:, None] - 1 + slot  # of the guess for every place
    if fill is None:
        unknown = guesses[:, -1:]
    else:
        place = generated[:, None] - 1 + slot
        unknown = fill.gather(1, place.clamp(0, fill.shape[1] - 1))
    window.copy_(torch.where(source <= last, guesses.gather(1, source.clamp(0, last)), unknown))
    window[:, 0] = checked[:, 0]
