"""4D attention masks of a window whose rows stand at different lengths."""

from __future__ import annotations

import torch

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def window_mask(
    positions: torch.Tensor, view: int, kind: str, size: int | None, dtype: torch.dtype | None
) -> torch.Tensor:
    """Which cache slots each row of the window may attend to.

    Args:
        positions: [B, n] absolute position, which is also the cache slot, of every window token.
        view: K, the number of slots that attention sees.
        kind: ``"full_attention"``, ``"sliding_attention"`` (the last `size` tokens) or
            ``"chunked_attention"`` (the tokens of the same chunk of `size`).
        dtype: None for a boolean mask (True: attend), else an additive one of this dtype.

    Returns:
        [B, 1, n, K].
    """
    slots = torch.arange(view, device=positions.device)
    queries = positions[:, None, :, None]
    allowed = slots <= queries
    if kind == SLIDING and size is not None:
        allowed &= slots > queries - size
    elif kind == CHUNKED and size is not None:
        allowed &= slots // size == queries // size
    if dtype is None:
        return allowed
    additive = torch.zeros_like(allowed, dtype=dtype)
    return additive.masked_fill_(~allowed, torch.finfo(dtype).min)
