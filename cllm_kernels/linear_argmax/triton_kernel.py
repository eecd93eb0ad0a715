"""linear_argmax in Triton: a tile of scores per program, reduced to one winner per row in place.

A second kernel takes the winners of a row's tiles in order of the vocabulary; no atomics, so the
result does not depend on which program ends first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, better, chained, device_of, tanh, tile_argmax
from cllm_kernels.gumbel_noise.arguments import check_row_ids
from cllm_kernels.gumbel_noise.triton_kernel import gumbel_tile

_NONE = tl.constexpr(2147483647)
_FAR = 2**31 // 256  # elements between rows: 256 rows, more than any tile has, stay below 2^31


@triton.jit
def linear_argmax_tiles_kernel(
    hidden_ptr,  # [rows, width], rows hidden_stride apart
    weight_ptr,  # [vocabulary, width], rows weight_stride apart
    bias_ptr,  # [vocabulary], unread unless HAS_BIAS
    seed_ptr,  # [1] int64, unread unless HAS_NOISE, as the next two
    noise_row_ptr,  # [rows] int64
    position_ptr,  # [rows] int64
    value_ptr,  # [rows, tiles] float32, written
    index_ptr,  # [rows, tiles] int32, written
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    tiles,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    # Programs that share a tile of the weight are neighbours, so it is read from memory once.
    tile = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tile * BLOCK_V
    tile_row = tl.arange(0, BLOCK_M)
    tile_column = tl.arange(0, BLOCK_V)
    row = first_row + tile_row
    column = first_column + tile_column
    real_row = row < rows
    real_column = column < vocabulary
    # Where the tile begins takes 64 bits, but one number for all; inside it 32 bits reach anywhere
    # (the launcher sees to that), and half as many registers hold the offsets.
    hidden_tile = hidden_ptr + first_row.to(tl.int64) * hidden_stride
    weight_tile = weight_ptr + first_column.to(tl.int64) * weight_stride
    hidden_offset = tile_row[:, None] * hidden_stride
    weight_offset = tile_column[None, :] * weight_stride
    scores = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        real = feature < width
        hidden = tl.load(
            hidden_tile + (hidden_offset + feature[None, :]),
            mask=real_row[:, None] & real[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_tile + (weight_offset + feature[:, None]),
            mask=real[:, None] & real_column[None, :],
            other=0.0,
        )
        # "ieee": fp32 operands are multiplied as they are, not rounded to tf32.
        scores = tl.dot(hidden, weight, scores, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=real_column, other=0.0).to(tl.float32)
        scores = scores + bias[None, :]
    if HAS_CAP:
        scores = softcap * tanh(scores / softcap)
    scores = scores * scale
    if HAS_NOISE:
        noise_row = tl.load(noise_row_ptr + row, mask=real_row, other=0)
        position = tl.load(position_ptr + row, mask=real_row, other=0)
        seed = tl.load(seed_ptr)
        scores += gumbel_tile(seed, noise_row, position, first_column, BLOCK_M, BLOCK_V)
    valid = real_column[None, :] & (row[:, None] >= 0)
    columns = column[None, :] + tl.zeros((BLOCK_M, BLOCK_V), tl.int32)
    value, index = tile_argmax(scores, columns, valid, _NONE)
    place = row.to(tl.int64) * tiles + tile
    tl.store(value_ptr + place, value, mask=real_row)
    tl.store(index_ptr + place, index, mask=real_row)


@triton.jit
def linear_argmax_reduce_kernel(
    tile_value_ptr,  # [rows, tiles] float32
    tile_index_ptr,  # [rows, tiles] int32
    index_ptr,  # [rows] int64, written
    value_ptr,  # [rows] float32, written
    tiles,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([1], float("-inf"), tl.float32)
    best_index = tl.full([1], _NONE, tl.int32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        valid = tile < tiles
        score = tl.load(tile_value_ptr + row * tiles + tile, mask=valid, other=float("-inf"))
        column = tl.load(tile_index_ptr + row * tiles + tile, mask=valid, other=_NONE)
        value, index = tile_argmax(score[None, :], column[None, :], valid[None, :], _NONE)
        best, best_index = better(value, index, best, best_index)
    place = row + tl.arange(0, 1)
    tl.store(index_ptr + place, best_index.to(tl.int64))
    tl.store(value_ptr + place, best)


def tile_shape(rows: int, dtype: torch.dtype, roomy: bool) -> dict[str, int]:
    """Tile sizes and launch options for this many rows of hidden. Reasoned, not measured.

    Decoding has few rows and is bound by reading the weight once. A multiprocessor of an H100 must
    keep some 20 KiB on their way (3.35 TB/s x 0.7 us / 132); a block of the shapes below asks for
    48 KiB and two to three blocks fit beside each other, so that one reads while another is in its
    epilogue, and 64 elements of a row of the weight are one whole 128-byte line. 128 columns give
    250 (V = 32000) to 2000 (256000) blocks per 128 rows: two or more for each multiprocessor, and
    the last wave leaves a twentieth of them idle.

    Beyond 16 rows the tile grows downward, to 128 rows, so that the weight passes from L2 into
    multiprocessors once per 128 rows, and from memory once in all: blocks of the same columns are
    neighbours. From about 300 rows on the matmul itself is the bound. 64 rows are the most unless
    `roomy`: beside 128 x 128 scores the registers hold neither their noise nor the addresses of
    operands whose rows are not aligned to 16 elements.

    fp32 is multiplied without tensor cores, with operands in registers: smaller tiles.

    Every shape stays below the 99 KiB of shared memory that the smallest of these GPUs have; a GPU
    older than Hopper keeps one stage less than it is told.
    """
    if dtype == torch.float32:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        warps = 8 if block_m == 64 else 4
        shape = {"BLOCK_M": block_m, "BLOCK_V": 64, "BLOCK_H": 32}
        return {**shape, "num_warps": warps, "num_stages": 4}
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 or not roomy else 128
    warps, stages = {16: (4, 5), 32: (4, 5), 64: (8, 4), 128: (8, 3)}[block_m]
    shape = {"BLOCK_M": block_m, "BLOCK_V": 128, "BLOCK_H": 64}
    return {**shape, "num_warps": warps, "num_stages": stages}


def _addressable(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, near enough to each other for 32-bit offsets in a tile."""
    if matrix.stride(1) == 1 and matrix.stride(0) < _FAR:
        return matrix
    return matrix.contiguous()


def linear_argmax(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
    temperature: float | None,
    seed: Tensor | None,  # [1] int64
    row: Tensor | None,  # [M] int64
    position: Tensor | None,  # [M] int64
) -> tuple[Tensor, Tensor]:
    """(index [M] int64, value [M] float32)."""
    hidden = _addressable(hidden)
    weight = _addressable(weight)
    bias = None if bias is None else bias.contiguous()
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    value = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return index, value
    if row is not None:
        check_row_ids("linear_argmax", row)
    pointers = (hidden.data_ptr(), weight.data_ptr())
    aligned = all(n % 16 == 0 for n in (width, hidden.stride(0), weight.stride(0), *pointers))
    shape = tile_shape(rows, hidden.dtype, roomy=seed is None and aligned)
    tiles = triton.cdiv(vocabulary, shape["BLOCK_V"])
    tile_value = torch.empty((rows, tiles), dtype=torch.float32, device=hidden.device)
    tile_index = torch.empty((rows, tiles), dtype=torch.int32, device=hidden.device)
    with device_of(hidden):
        linear_argmax_tiles_kernel[(triton.cdiv(rows, shape["BLOCK_M"]), tiles)](
            hidden,
            weight,
            hidden if bias is None else bias,
            index if seed is None else seed,
            index if row is None else row,
            index if position is None else position,
            tile_value,
            tile_index,
            rows,
            vocabulary,
            width,
            hidden.stride(0),
            weight.stride(0),
            tiles,
            softcap or 0.0,
            1.0 if temperature is None else 1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_CAP=softcap is not None,
            HAS_NOISE=seed is not None,
            **shape,
            **chained(hidden),
            **FUSION,
        )
        linear_argmax_reduce_kernel[(rows,)](
            *(tile_value, tile_index, index, value, tiles),
            BLOCK=256,
            num_warps=4,
            **chained(hidden),
            **FUSION,
        )
    return index, value
