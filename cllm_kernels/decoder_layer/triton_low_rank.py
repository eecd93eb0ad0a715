"""Low-rank terms of a decoder layer's linear layers on a GPU: one launch for all that read the same
input, instead of two products and a sum for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained

LowRank = tuple[Tensor, Tensor]

_BLOCK_OUT = 64


@triton.jit
def low_rank_tiles_kernel(
    x_ptr,  # [B, n, width]
    a0_ptr,  # [rank0, width]; of absent layers those of the first
    a1_ptr,
    a2_ptr,
    b0_ptr,  # [rows0, rank0]
    b1_ptr,
    b2_ptr,
    out0_ptr,  # [B, n, rows0], added to from token `first` on
    out1_ptr,
    out2_ptr,
    rows0,
    rows1,
    rows2,
    rank0,
    rank1,
    rank2,
    end0,  # tiles of outputs up to and with those of layer 0, of layer 1
    end1,
    n,
    first,
    width,
    COUNT: tl.constexpr,  # layers, 1 to 3
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RANK: tl.constexpr,  # the largest, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    a_ptr, b_ptr, out_ptr, rows, rank, begin = a0_ptr, b0_ptr, out0_ptr, rows0, rank0, 0
    if (COUNT > 1) & (tile >= end0):
        a_ptr, b_ptr, out_ptr, rows, rank, begin = a1_ptr, b1_ptr, out1_ptr, rows1, rank1, end0
    if (COUNT > 2) & (tile >= end1):
        a_ptr, b_ptr, out_ptr, rows, rank, begin = a2_ptr, b2_ptr, out2_ptr, rows2, rank2, end1
    token = first + tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_token = token < n
    line = row * n + token
    order = tl.arange(0, RANK)
    real_order = order < rank
    shrunk = tl.zeros([BLOCK_T, RANK], tl.float32)
    for start in range(0, width, BLOCK_I):
        column = start + tl.arange(0, BLOCK_I)
        real = column < width
        x = tl.load(
            x_ptr + line[:, None] * width + column[None, :],
            mask=real_token[:, None] & real[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + order[None, :] * width + column[:, None],
            mask=real[:, None] & real_order[None, :],
            other=0.0,
        )
        shrunk = tl.dot(x, a, shrunk, input_precision="ieee")
    output = (tile - begin) * BLOCK_O + tl.arange(0, BLOCK_O)
    real_output = output < rows
    b = tl.load(
        b_ptr + output[None, :] * rank + order[:, None],
        mask=real_order[:, None] & real_output[None, :],
        other=0.0,
    )
    term = tl.dot(shrunk.to(b.dtype), b, input_precision="ieee")
    place = out_ptr + line[:, None] * rows + output[None, :]
    stored = real_token[:, None] & real_output[None, :]
    out = tl.load(place, mask=stored, other=0.0).to(tl.float32)
    tl.store(place, (out + term).to(out_ptr.dtype.element_ty), mask=stored)


def tile_shape(tokens: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options for so many tokens and the largest rank. fp32 is multiplied
    without tensor cores, out of registers."""
    block_t = 16 if tokens <= 16 or dtype == torch.float32 else 32
    return {
        "BLOCK_T": block_t,
        "BLOCK_O": _BLOCK_OUT,
        "BLOCK_I": 32 if dtype == torch.float32 else 64,
        "RANK": max(16, triton.next_power_of_2(rank)),
        "num_warps": 8 if dtype == torch.float32 else 4,
        "num_stages": 2 if dtype == torch.float32 else 3,
    }


def largest_rank(dtype: torch.dtype) -> int:
    """Of the kernel, which holds a tile's products with all of a matrix in registers."""
    return 32 if dtype == torch.float32 else 64


def add_low_rank(
    outs: Sequence[Tensor],  # each [B, n, rows] contiguous, changed in place
    pairs: Sequence[LowRank | None],
    x: Tensor,  # [B, n, width] contiguous
    first: int,
) -> None:
    """Adds (x A^T) B^T to the tokens from `first` on of each of up to three `outs`."""
    there = [(out, *pair) for out, pair in zip(outs, pairs, strict=True) if pair is not None]
    if not there:
        return
    batch, n, width = x.shape
    largest = max(a.shape[0] for _, a, _ in there)
    if largest > largest_rank(x.dtype):
        for out, a, b in there:
            out[:, first:] += x[:, first:] @ a.T @ b.T
        return
    shape = tile_shape(n - first, largest, x.dtype)
    ends: list[int] = []
    for out, _, _ in there:
        ends.append(triton.cdiv(out.shape[2], _BLOCK_OUT) + (ends[-1] if ends else 0))
    padded = [*there, *[there[0]] * (3 - len(there))]
    low_rank_tiles_kernel[(ends[-1], batch, triton.cdiv(n - first, shape["BLOCK_T"]))](
        x,
        *(a for _, a, _ in padded),
        *(b for _, _, b in padded),
        *(out for out, _, _ in padded),
        *(out.shape[2] for out, _, _ in padded),
        *(a.shape[0] for _, a, _ in padded),
        ends[0],
        ends[min(1, len(ends) - 1)],
        n,
        first,
        width,
        COUNT=len(there),
        **shape,
        **chained(x),
        **FUSION,
    )
