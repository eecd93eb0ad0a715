"""Low-rank terms of a decoder layer's linear layers on a GPU, without a product of their own.

Layers that read the same input have their A below each other: one matrix more among the weights
that `block_linear` reads in its launch, so that x A^T of all of them is there when the products
are. A small launch behind it adds (x A^T) B^T to the rows that get it and does what the products'
own last step would have done: SwiGLU, the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained
from cllm_kernels.block_linear.triton_kernel import silu_mul
from cllm_kernels.decoder_layer.weights import LowRank, below_each_other

_BLOCK_OUT = 64
_BLOCK_RANK = 32


@dataclass(frozen=True)
class Terms:
    """The terms of layers that read the same input.

    Attributes:
        a: [ranks, width], the layers' A below each other.
        b: of each layer [rows, its rank], or None.
        begins: row of `a` at which each layer's begin.
    """

    a: Tensor
    b: tuple[Tensor | None, ...]
    begins: tuple[int, ...]


def gather(pairs: Sequence[LowRank | None]) -> Terms | None:
    """The terms of layers with these pairs; None: no layer has one."""
    ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
    there = [pair for pair, rank in zip(pairs, ranks, strict=True) if pair is not None and rank]
    if not there:
        return None
    b = tuple(
        pair[1] if pair is not None and rank else None
        for pair, rank in zip(pairs, ranks, strict=True)
    )
    begins = tuple(sum(ranks[:index]) for index in range(len(ranks)))
    return Terms(one_of([a for a, _ in there]), b, begins)


def one_of(matrices: Sequence[Tensor]) -> Tensor:
    """[sum of rows, width] of matrices [rows, width], contiguous; a copy unless they are so in
    memory."""
    if not below_each_other(matrices):
        return torch.cat(list(matrices))
    first, width = matrices[0], matrices[0].shape[1]
    return first.as_strided((sum(len(matrix) for matrix in matrices), width), (width, 1))


@triton.jit
def term_of(
    shrunk_ptr,  # [B * n, ranks], at the layer's first column
    b_ptr,  # [outputs, rank]
    line,  # [BLOCK_T], rows of shrunk
    real_token,  # [BLOCK_T]
    output,  # [BLOCK_O], rows of b
    real_output,  # [BLOCK_O]
    ranks,
    rank,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(x A^T) B^T [BLOCK_T, BLOCK_O] in fp32; zeros where the rank is 0."""
    term = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, rank, BLOCK_R):
        order = start + tl.arange(0, BLOCK_R)
        real = order < rank
        shrunk = tl.load(
            shrunk_ptr + line[:, None] * ranks + order[None, :],
            mask=real_token[:, None] & real[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + output[None, :].to(tl.int64) * rank + order[:, None],
            mask=real[:, None] & real_output[None, :],
            other=0.0,
        )
        term = tl.dot(shrunk, b, term, input_precision="ieee")
    return term


@triton.jit
def expand_tiles_kernel(
    shrunk_ptr,  # [B, n, ranks]
    b0_ptr,  # [rows0, rank0]; of absent layers anything
    b1_ptr,  # [rows1, rank1]
    b2_ptr,  # [rows2, rank2]
    out0_ptr,  # [B, n, rows0], changed
    out1_ptr,  # [B, n, rows1], changed unless SWIGLU
    out2_ptr,  # [B, n, rows2], changed
    add_ptr,  # [B, n, rows0], read where HAS_ADD
    rows0,
    rows1,
    rows2,
    rank0,
    rank1,
    rank2,
    at1,  # columns of shrunk at which the ranks of layer 1 begin, and of layer 2
    at2,
    ranks,
    end0,  # tiles of outputs up to and with those of layer 0, of layer 1
    end1,
    n,
    begin,  # first token that changes
    first,  # first token that gets the terms
    COUNT: tl.constexpr,  # layers that are written, 1 to 3
    SWIGLU: tl.constexpr,  # layer 0 becomes silu(layer 0) * layer 1
    HAS_ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    tile = tl.program_id(0)
    b_ptr, out_ptr, rows, rank, at, base = b0_ptr, out0_ptr, rows0, rank0, 0, 0
    if (COUNT > 1) & (tile >= end0):
        b_ptr, out_ptr, rows, rank, at, base = b1_ptr, out1_ptr, rows1, rank1, at1, end0
    if (COUNT > 2) & (tile >= end1):
        b_ptr, out_ptr, rows, rank, at, base = b2_ptr, out2_ptr, rows2, rank2, at2, end1
    token = begin + tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_token = token < n
    gated = (token >= first)[:, None]
    line = tl.program_id(1).to(tl.int64) * n + token
    output = (tile - base) * BLOCK_O + tl.arange(0, BLOCK_O)
    real_output = output < rows
    term = term_of(
        shrunk_ptr + at,
        b_ptr,
        line,
        real_token,
        output,
        real_output,
        ranks,
        rank,
        BLOCK_T,
        BLOCK_O,
        BLOCK_R,
    )
    place = line[:, None] * rows + output[None, :]
    stored = real_token[:, None] & real_output[None, :]
    kind = out_ptr.dtype.element_ty
    out = tl.load(out_ptr + place, mask=stored, other=0.0)
    out = tl.where(gated, (out.to(tl.float32) + term).to(kind), out)
    if SWIGLU:
        term = term_of(
            shrunk_ptr + at1,
            b1_ptr,
            line,
            real_token,
            output,
            real_output,
            ranks,
            rank1,
            BLOCK_T,
            BLOCK_O,
            BLOCK_R,
        )
        up = tl.load(out1_ptr + place, mask=stored, other=0.0)
        up = tl.where(gated, (up.to(tl.float32) + term).to(kind), up)
        out = silu_mul(out.to(tl.float32), up.to(tl.float32), kind)
    if HAS_ADD:
        add = tl.load(add_ptr + place, mask=stored, other=0.0)
        out = (add.to(tl.float32) + out.to(tl.float32)).to(kind)
    tl.store(out_ptr + place, out, mask=stored)


def tile_shape(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options for so many tokens. fp32 is multiplied without tensor cores,
    out of registers."""
    single = dtype == torch.float32
    return {
        "BLOCK_T": 16 if tokens <= 16 or single else 32,
        "BLOCK_O": _BLOCK_OUT,
        "BLOCK_R": _BLOCK_RANK,
        "num_warps": 8 if single else 4,
        "num_stages": 2,
    }


def expand(
    outs: Sequence[Tensor],  # one to three [B, n, rows] contiguous, the first or all changed
    shrunk: Tensor,  # [B, n, ranks] contiguous, x A^T
    terms: Terms,
    first: int,
    *,
    swiglu: bool = False,
    add: Tensor | None = None,  # [B, n, rows] contiguous, of a single layer
) -> list[Tensor]:
    """`outs`, with their terms added to the tokens from `first` on; with `swiglu` of two of them
    silu(the first) * the second alone, with `add` that and the layer, of all tokens."""
    batch, n, ranks = shrunk.shape
    written = outs[:1] if swiglu else outs
    begin = 0 if swiglu or add is not None else first
    shape = tile_shape(n - begin, shrunk.dtype)
    ends: list[int] = []
    for out in written:
        ends.append(triton.cdiv(out.shape[2], _BLOCK_OUT) + (ends[-1] if ends else 0))
    absent = 3 - len(outs)
    begins = (*terms.begins, *[0] * absent)
    expand_tiles_kernel[(ends[-1], batch, triton.cdiv(n - begin, shape["BLOCK_T"]))](
        shrunk,
        *(shrunk if b is None else b for b in (*terms.b, *[None] * absent)),
        *(*outs, *[outs[0]] * absent),
        outs[0] if add is None else add,
        *(*(out.shape[2] for out in outs), *[0] * absent),
        *(*(0 if b is None else b.shape[1] for b in terms.b), *[0] * absent),
        begins[1],
        begins[2],
        ranks,
        ends[0],
        ends[min(1, len(ends) - 1)],
        n,
        begin,
        first,
        COUNT=len(written),
        SWIGLU=swiglu,
        HAS_ADD=add is not None,
        **shape,
        **chained(shrunk),
        **FUSION,
    )
    return list(written)
