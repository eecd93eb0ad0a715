"""How the Triton kernels of block_attention cut their work: chains, tiles and splits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Chains(NamedTuple):
    """How the n tokens of a block are cut into chains, all of which begin behind the cache.

    Attributes:
        first: tokens of the first chain.
        width: of every other one; the last may have fewer.
        kept: the others are stored as well, token i of the block in slot ``lengths[b] + i``.
    """

    first: int
    width: int
    kept: bool

    def count(self, n: int) -> int:
        """Of the chains of n tokens."""
        return 1 + triton.cdiv(max(0, n - self.first), self.width)


def tile_shape(
    query_rows: int, padded: int, dtype: torch.dtype, aligned: bool = True
) -> dict[str, int]:
    """Tile sizes and launch options for G * n query rows and a head size padded to `padded`.

    Where keys are not aligned they are loaded element by element, which takes registers; fp32 is
    multiplied without tensor cores, out of registers too: both get smaller tiles.
    """
    block_m = 16 if query_rows <= 16 else 32 if query_rows <= 32 else 64
    if dtype == torch.float32:
        block_n = 32 if padded <= 128 else 16
        return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}
    if not aligned:
        block_m = min(block_m, 32 if padded <= 128 else 16)
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if padded > 128:
        return {"BLOCK_M": min(block_m, 32), "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    warps = 4 if block_m <= 32 else 8
    stages = 3 if padded < 128 or block_m <= 32 else 2
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "num_warps": warps, "num_stages": stages}


def combine_shape(padded: int) -> dict[str, int]:
    """Query rows per program of the second kernel: few, so that there are programs enough."""
    return {"BLOCK_R": 4 if padded <= 128 else 2, "num_warps": 4}


# Slots of a split: below, writing and adding up the parts costs more than it spreads. A multiple of
# every BLOCK_N.
_SPLIT_SLOTS = 512
_MOST_SPLITS = 64  # of a cache; of a longer one splits are longer
# Blocks of up to so many tokens are cut into the same splits where they see a window.
_ANY_BLOCK = 64


def split_size(slots: int) -> int:
    """Slots per split of a cache of so many. They depend on nothing else: not on the tokens of the
    block or the rows of the batch, so that a token's sums are the same in any company."""
    size = _SPLIT_SLOTS
    while size * _MOST_SPLITS < slots:
        size *= 2
    return size


def cuts(
    slots: int, window: int | None, tokens: int, split_slots: int | None, block_n: int
) -> tuple[int, int]:
    """(slots per split, splits) of a cache of so many slots, for chains of `tokens` at most: the
    same for all blocks of up to `_ANY_BLOCK` of them. `split_slots`: instead of `split_size`."""
    seen = slots
    if window is not None:
        slots, seen = min(slots, window + max(tokens, _ANY_BLOCK)), min(slots, window)
    size = triton.cdiv(split_slots or split_size(seen), block_n) * block_n
    return size, triton.cdiv(slots, size)
