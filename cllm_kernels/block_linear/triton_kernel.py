"""block_linear on a GPU: up to three linear layers of the same few rows in one launch.

A product of few rows is the time in which its weight is read. So a launch reads the weights of all
layers that take the same input, each once, and does in its last step what would read the result
again: the bias, SwiGLU, rotary positions, the residual.

A row's sums are made in the same order beside any other rows, for any number of them and in every
tile: in steps of the tensor cores' 16 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.runtime import driver

from cllm_kernels._common import without_autocast
from cllm_kernels._triton import FUSION, await_inputs, chained, device_of

linear = without_autocast(functional.linear)
MOST_ROWS = 64  # above, torch's own product
SHARED = 227 * 1024  # bytes of shared memory that a block may have on an H100


@triton.jit
def silu_mul(gate, up, kind: tl.constexpr):
    """silu(gate) * up of fp32 tensors that hold values of `kind`, rounded as torch's modules do."""
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    return (silu * up).to(kind)


@triton.jit
def turned(low, high, cos_low, cos_high, sin_low, sin_high, kind: tl.constexpr):
    """The two halves of heads at their positions; fp32 tensors that hold values of `kind`."""
    # each product is rounded before the sum, as torch's are
    new_low = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    new_high = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    return new_low.to(kind), new_high.to(kind)


@triton.jit
def block_linear_tiles_kernel(
    x_ptr,  # [rows, width]
    weight0_ptr,  # [columns0, width]; of absent layers those of the first, as in all that follows
    weight1_ptr,  # [columns1, width]
    weight2_ptr,  # [columns2, width]
    bias0_ptr,  # [columns0], read where HAS_BIAS
    bias1_ptr,  # [columns1]
    bias2_ptr,  # [columns2]
    add_ptr,  # [rows, columns0], read where HAS_ADD
    more_ptr,  # [more, width], read where HAS_MORE
    cos_ptr,  # [places, 2 * HALF], read where HALF
    sin_ptr,  # [places, 2 * HALF]
    out0_ptr,  # [rows, columns0], written
    out1_ptr,  # [rows, columns1], written
    out2_ptr,  # [rows, columns2], written
    more_out_ptr,  # [rows, more], written where HAS_MORE
    rows,
    width,
    columns0,
    columns1,
    columns2,
    more,
    end0,  # tiles of columns up to and with those of output 0, of output 1, of all outputs
    end1,
    end,
    places,  # rows of cos and sin: row r of x stands at place r % places
    COUNT: tl.constexpr,  # outputs, 1 to 3
    SWIGLU: tl.constexpr,  # the output is silu(layer 0) * layer 1
    HALF: tl.constexpr,  # of the size of a head, where outputs 0 and 1 are to be turned; else 0
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_MORE: tl.constexpr,  # one weight more, whose product has no bias and is done as it is
    EVEN_N: tl.constexpr,  # columns are multiples of BLOCK_N
    EVEN_K: tl.constexpr,  # width is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    # Programs that share a tile of a weight are neighbours, so it comes from memory once.
    tile = tl.program_id(1)
    weight_ptr, bias_ptr, out_ptr, columns, begin = weight0_ptr, bias0_ptr, out0_ptr, columns0, 0
    if (COUNT > 1) & (tile >= end0):
        weight_ptr, bias_ptr, out_ptr = weight1_ptr, bias1_ptr, out1_ptr
        columns, begin = columns1, end0
    if (COUNT > 2) & (tile >= end1):
        weight_ptr, bias_ptr, out_ptr = weight2_ptr, bias2_ptr, out2_ptr
        columns, begin = columns2, end1
    biased = columns
    if HAS_MORE & (tile >= end):
        weight_ptr, out_ptr, columns, begin, biased = more_ptr, more_out_ptr, more, end, 0
    # Where two columns make one result, a program has a tile of the one and a tile of the other:
    # of gate and up the same columns, of a head as many of its upper half as of its lower.
    PAIRED: tl.constexpr = SWIGLU or HALF > 0
    first_column = (tile - begin) * BLOCK_N
    other_ptr, other_column = weight1_ptr, first_column
    if HALF > 0:
        first_column += (tile - begin) // (HALF // BLOCK_N) * HALF
        other_ptr, other_column = weight_ptr, first_column + HALF
    await_inputs(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    real_row = row < rows
    real_column = column < columns
    # One number of 64 bits for the tile; inside it 32 bits reach anywhere.
    x_offset = row[None, :] * width
    line = tl.arange(0, BLOCK_N)
    if HAS_MORE:  # which need not be whole tiles; its last row stands for those that are not there
        line = tl.minimum(line, columns - first_column - 1)
    weight_offset = line[:, None] * width
    weight_tile = weight_ptr + first_column.to(tl.int64) * width
    other_tile = other_ptr + other_column.to(tl.int64) * width
    # Columns down, rows across: tensor cores want 16 to 64 of what stands down and are content with
    # 8 across, and a warp reads a weight of its own but all of x out of shared memory.
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    other = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        x_mask = real_row[None, :]
        weight_mask = real_column[:, None]
        if not EVEN_K:
            x_mask = x_mask & (feature < width)[:, None]
            weight_mask = weight_mask & (feature < width)[None, :]
        x = tl.load(x_ptr + x_offset + feature[:, None], mask=x_mask, other=0.0)
        weight_place = weight_tile + weight_offset + feature[None, :]
        if EVEN_N and EVEN_K:
            weight = tl.load(weight_place)
        else:
            weight = tl.load(weight_place, mask=weight_mask, other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
        if PAIRED:
            other_place = other_tile + weight_offset + feature[None, :]
            if EVEN_N and EVEN_K:
                weight = tl.load(other_place)
            else:
                weight = tl.load(other_place, mask=weight_mask, other=0.0)
            other = tl.dot(weight, x, other, input_precision="ieee")
    kind = out0_ptr.dtype.element_ty
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0)
        acc += bias.to(tl.float32)[:, None]
        if PAIRED:
            other_bias_ptr = bias1_ptr if SWIGLU else bias_ptr + HALF
            bias = tl.load(other_bias_ptr + column, mask=real_column, other=0.0)
            other += bias.to(tl.float32)[:, None]
    place = row.to(tl.int64)[None, :] * columns + column[:, None]
    stored = real_row[None, :] & real_column[:, None]
    out, second = acc.to(kind), other.to(kind)
    if SWIGLU:
        out = silu_mul(out.to(tl.float32), second.to(tl.float32), kind)
    if HAS_ADD:
        add = tl.load(add_ptr + place, mask=stored, other=0.0)
        out = (add.to(tl.float32) + out.to(tl.float32)).to(kind)
    if HALF > 0:
        if tile < end1:
            angle = (row % places)[None, :] * (2 * HALF) + (column % (2 * HALF))[:, None]
            cos_low = tl.load(cos_ptr + angle, mask=stored, other=0.0).to(tl.float32)
            cos_high = tl.load(cos_ptr + angle + HALF, mask=stored, other=0.0).to(tl.float32)
            sin_low = tl.load(sin_ptr + angle, mask=stored, other=0.0).to(tl.float32)
            sin_high = tl.load(sin_ptr + angle + HALF, mask=stored, other=0.0).to(tl.float32)
            out, second = turned(
                out.to(tl.float32),
                second.to(tl.float32),
                cos_low,
                cos_high,
                sin_low,
                sin_high,
                kind,
            )
        tl.store(out_ptr + place + HALF, second, mask=stored)
    tl.store(out_ptr + place, out, mask=stored)


# Chosen on an H200 for 1 and 16 rows, with layers of SmolLM2-135M's and of LLaMA-2-7B's shape:
# BLOCK_N, BLOCK_K, stages, warps. Small layers have less than 4 million weights; long ones
# more than twice as many inputs as columns, and of those so few columns that only narrow tiles keep
# all multiprocessors busy. Of more than 16 rows that is too much x for each of them to read.
_TILES = {
    "small": (16, 64, 6, 4),
    "small long": (16, 512, 3, 2),
    "small swiglu": (64, 64, 5, 4),
    "small turned": (16, 64, 8, 2),
    "large": (64, 128, 6, 4),
    "large long": (16, 256, 5, 1),
    "large swiglu": (64, 64, 4, 4),
    "large turned": (64, 128, 4, 4),
}


def tile_shape(
    rows: int,
    columns: int,
    width: int,
    *,
    swiglu: bool = False,
    turned: bool = False,
    shared: int = SHARED,
) -> dict[str, int]:
    """Tile sizes and launch options for so many rows, and columns in all, and inputs.

    No shape of these changes a bit of the result on Hopper, whose two kinds of matrix instructions
    add up alike; other GPUs have not been looked at.

    Args:
        shared: bytes of shared memory that a block may have; where it is less than an H100's, less
            is on its way at once.
    """
    size = "small" if columns * width < 1 << 22 else "large"
    long = width > 2 * columns and (rows <= 16 or size == "small")
    kind = "turned" if turned else "swiglu" if swiglu else "long" if long else ""
    n, k, stages, warps = _TILES[f"{size} {kind}".strip()]
    if width % k:
        k = 64
    m = max(16, min(MOST_ROWS, triton.next_power_of_2(rows)))
    while k > 64 and m * k > 4096 * warps:  # or registers do not hold what a thread loads
        k //= 2
    if (swiglu or turned) and m * n > 2048:  # two tiles of sums for a thread to hold
        warps = 8
    step = 2 * k * (m + (2 * n if swiglu or turned else n))  # bytes
    while stages > 2 and stages * step > shared - 1024:
        stages -= 1
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_stages": stages, "num_warps": warps}


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return SHARED
    found: int = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return found


def takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel is made for this: few rows of 16 bits; weights in one piece, whose rows
    are whole vectors."""
    width = x.shape[-1]
    return (
        x.dtype != torch.float32
        and width > 0
        and width % 16 == 0
        and 0 < x.numel() <= MOST_ROWS * width
        and all(weight.is_contiguous() and weight.shape[0] > 0 for weight in weights)
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, *weights))
    )


def turns(rows: int, columns: int, width: int, head_size: int) -> bool:
    """Whether `few_rows` can turn heads of this size: a half of one is whole tiles."""
    block_n = tile_shape(rows, columns, width, turned=True)["BLOCK_N"]
    return head_size % 2 == 0 and (head_size // 2) % block_n == 0


def few_rows(
    x: Tensor,  # [..., width] contiguous, at most MOST_ROWS rows of 16 bits
    weights: Sequence[Tensor],  # one to three [columns, width], contiguous
    biases: Sequence[Tensor | None],  # [columns] each, contiguous, all or none
    *,
    swiglu: bool = False,
    add: Tensor | None = None,  # [..., columns] contiguous, of a single layer
    turn: tuple[Tensor, Tensor] | None = None,  # cos and sin, each [B or 1, n, D] contiguous
    more: Tensor | None = None,  # [columns, width] contiguous
) -> list[Tensor]:
    """[..., columns] of every layer; with `swiglu`, of two of them silu(the first) * the second
    alone; with `add`, that and the layer; with `turn`, of x [B, n, width], the first two of three
    with their heads turned, see `turns`; with `more` and none of these, behind them the product
    with one weight more, which has no bias."""
    width = x.shape[-1]
    rows = x.numel() // width
    columns = [weight.shape[0] for weight in weights]
    outs = [x.new_empty((*x.shape[:-1], size)) for size in (columns[:1] if swiglu else columns)]
    has_bias = biases[0] is not None
    half = 0 if turn is None else turn[0].shape[-1] // 2
    shape = tile_shape(
        *(rows, sum(columns), width), swiglu=swiglu, turned=half > 0, shared=_shared(x.device)
    )
    block_n, block_k = shape["BLOCK_N"], shape["BLOCK_K"]
    ends: list[int] = []
    for size in columns[: len(outs)]:
        tiles = triton.cdiv(size // 2 if half else size, block_n)
        ends.append(tiles + (ends[-1] if ends else 0))
    extra = 0 if more is None else more.shape[0]
    more_out = outs[0] if more is None else x.new_empty((*x.shape[:-1], extra))
    chain = chained(x)

    def padded(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        first = x if tensors[0] is None else tensors[0]
        return [first if t is None else t for t in (*tensors, *[None] * (3 - len(tensors)))]

    with device_of(x):
        tiles = ends[-1] + triton.cdiv(extra, block_n)
        block_linear_tiles_kernel[(triton.cdiv(rows, shape["BLOCK_M"]), tiles)](
            x,
            *padded(weights),
            *padded(biases),
            x if add is None else add,
            x if more is None else more,
            *((x, x) if turn is None else turn),
            *padded(outs),
            more_out,
            rows,
            width,
            *(columns + [columns[0]] * (3 - len(columns))),
            extra,
            ends[0],
            ends[min(1, len(ends) - 1)],
            ends[-1],
            1 if turn is None else turn[0].shape[0] * turn[0].shape[1],
            COUNT=len(outs),
            SWIGLU=swiglu,
            HALF=half,
            HAS_BIAS=has_bias,
            HAS_ADD=add is not None,
            HAS_MORE=more is not None,
            EVEN_N=all(size % block_n == 0 for size in columns),
            EVEN_K=width % block_k == 0,
            **chain,
            **shape,
            **FUSION,
        )
    return outs if more is None else [*outs, more_out]


def block_linear(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [N, H]
    bias: Tensor | None,  # [N]
    a: Tensor | None,  # [R, H]
    b: Tensor | None,  # [N, R]
    gated_from: int,
) -> Tensor:
    """[..., N] of x's dtype; what the kernel is not made for goes to torch's product."""
    if takes(x, [weight]):
        # the kernel reads a bias from its address on
        (out,) = few_rows(x.contiguous(), [weight], [None if bias is None else bias.contiguous()])
    else:
        out = linear(x, weight, bias)
    if a is not None and b is not None:
        out[..., gated_from:, :] += linear(linear(x[..., gated_from:, :], a), b)
    return out
