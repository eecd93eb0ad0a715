"""row_argmax in Triton: every row in a few pieces, the pieces reduced in order; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, better, device_of, tile_argmax
from cllm_kernels.row_argmax.layout import row_layout

_NONE = tl.constexpr(2147483647)
_BLOCK = 2048
_PROGRAMS = 512  # enough to keep every multiprocessor reading when there are few rows


@triton.jit
def row_argmax_pieces_kernel(
    logits_ptr,  # [rows / inner, inner, columns], any of three float types
    value_ptr,  # [rows, pieces] float32, written
    index_ptr,  # [rows, pieces] int32, written
    inner,
    outer_stride,
    inner_stride,
    columns,
    pieces,
    piece_length,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    data = logits_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    begin = piece * piece_length
    end = tl.minimum(begin + piece_length, columns)
    best = tl.full([1], float("-inf"), tl.float32)
    best_index = tl.full([1], _NONE, tl.int32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < end
        score = tl.load(data + column, mask=valid, other=float("-inf")).to(tl.float32)
        value, index = tile_argmax(score[None, :], column[None, :], valid[None, :], _NONE)
        best, best_index = better(value, index, best, best_index)
    place = row * pieces + piece + tl.arange(0, 1)
    tl.store(value_ptr + place, best)
    tl.store(index_ptr + place, best_index)


@triton.jit
def row_argmax_reduce_kernel(
    logits_ptr,  # [rows / inner, inner, columns]
    piece_value_ptr,  # [rows, pieces] float32
    piece_index_ptr,  # [rows, pieces] int32
    index_ptr,  # [rows] int64, written
    value_ptr,  # [rows] of the logits' dtype, written
    inner,
    outer_stride,
    inner_stride,
    pieces,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([1], float("-inf"), tl.float32)
    best_index = tl.full([1], _NONE, tl.int32)
    for start in range(0, pieces, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        valid = piece < pieces
        score = tl.load(piece_value_ptr + row * pieces + piece, mask=valid, other=float("-inf"))
        column = tl.load(piece_index_ptr + row * pieces + piece, mask=valid, other=_NONE)
        value, index = tile_argmax(score[None, :], column[None, :], valid[None, :], _NONE)
        best, best_index = better(value, index, best, best_index)
    place = row + tl.arange(0, 1)
    tl.store(index_ptr + place, best_index.to(tl.int64))
    # The element itself, so that its sign of zero and its NaN payload survive.
    data = logits_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    tl.store(value_ptr + place, tl.load(data + best_index))


def row_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., V] -> (index [...], value [...])."""
    shape = logits.shape[:-1]
    index = torch.empty(shape, dtype=torch.int64, device=logits.device)
    value = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    layout = row_layout(logits)
    rows, columns = layout.rows, layout.columns
    if rows == 0:
        return index, value
    blocks = triton.cdiv(columns, _BLOCK)
    pieces = min(blocks, max(1, triton.cdiv(_PROGRAMS, rows)))
    length = triton.cdiv(blocks, pieces) * _BLOCK
    pieces = triton.cdiv(columns, length)
    piece_value = torch.empty((rows, pieces), dtype=torch.float32, device=logits.device)
    piece_index = torch.empty((rows, pieces), dtype=torch.int32, device=logits.device)
    strides = (layout.inner, layout.outer_stride, layout.inner_stride)
    with device_of(logits):
        row_argmax_pieces_kernel[(rows, pieces)](
            layout.logits,
            piece_value,
            piece_index,
            *strides,
            columns,
            pieces,
            length,
            BLOCK=_BLOCK,
            num_warps=8,
            **FUSION,
        )
        row_argmax_reduce_kernel[(rows,)](
            layout.logits,
            piece_value,
            piece_index,
            index,
            value,
            *strides,
            pieces,
            BLOCK=128,
            num_warps=1,
            **FUSION,
        )
    return index, value
