"""4D attention masks of a window whose rows stand at different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..traits import CHUNKED, SLIDING


@dataclass(frozen=True)
class RaggedBlock:
    """What `block_mask` tells a layer's attention.

    Attributes:
        plan: the `cache.BlockPlan` of the forward.
        window: positions that a query sees, or None: all before it.
    """

    plan: Any
    window: int | None


def block_mask(plan: Any, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """A mask [1, 1, 1, 1] that stands for a ragged block: `attention.cllm_attention_forward` finds
    a `RaggedBlock` on it. Whoever takes it for a mask of numbers gets NaN, not a wrong text."""
    mask = torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=plan.device)
    mask._cllm_block = RaggedBlock(plan, window)  # type: ignore[attr-defined]
    return mask


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


def chains_mask(
    positions: torch.Tensor,
    first: int,
    width: int,
    view: int,
    kind: str,
    size: int | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Which cache slots the rows of several chains behind the same text may attend to.

    Row i of the first chain, at position ``len + i``, sees what row i of a plain window sees. So
    does a row of another chain, at the same position: the slots of committed tokens, and of its own
    chain up to itself. The slot of a block's row j is ``len + j``.

    What stands in the slots of other chains may be garbage, so blocked places get -inf, which no
    finite score outweighs, and a boolean mask says so to `attention`.

    Args:
        positions: [B, N] position of every row, chain after chain; those of the first chain are
            their slots.
        first: rows of the first chain.
        width: rows of every other one.
        view, kind, size, dtype: as in `window_mask`.

    Returns:
        [B, 1, N, K].
    """
    slots = torch.arange(view, device=positions.device)
    start = positions[:, :1, None, None]  # [B, 1, 1, 1]
    queries = positions[:, None, :, None]
    rows = torch.arange(positions.shape[1], device=positions.device)[:, None]
    # [N, 1] first row of the chain that a row is of
    begins = torch.where(rows < first, 0, rows - (rows - first) % width)
    own = slots - start  # [B, 1, 1, K] the row of the block that stands there; negative: none
    keys = torch.where(own < 0, slots, slots - begins)  # positions, where the chain is the row's
    allowed = (keys <= queries) & ((own < 0) | (own >= begins))
    if kind == SLIDING and size is not None:
        allowed &= keys > queries - size
    elif kind == CHUNKED and size is not None:
        allowed &= keys // size == queries // size
    if dtype is None:
        allowed._cllm_exact = True  # type: ignore[attr-defined]
        return allowed
    additive = torch.zeros_like(allowed, dtype=dtype)
    return additive.masked_fill_(~allowed, float("-inf"))
