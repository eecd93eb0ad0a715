"""gumbel_noise in Triton, tile by tile; `gumbel_tile` serves other kernels' epilogues.

gumbel_noise/reference.py is the definition and explains each step: same operations, same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, device_of
from cllm_kernels.gumbel_noise import reference

COLUMNS = 1024  # of a row per program
WARPS = 4
_SERIES = [tl.constexpr(coefficient) for coefficient in reference.LOG_SERIES]
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = _SERIES
_LOG2_HIGH = tl.constexpr(reference.LOG2_HIGH)
_LOG2_LOW = tl.constexpr(reference.LOG2_LOW)
_SQRT_HALF = tl.constexpr(reference.SQRT_HALF)


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _log(exponent, f):
    e = exponent.to(tl.float32)
    q = f * _Q0 + _Q1
    q = q * f + _Q2
    q = q * f + _Q3
    q = q * f + _Q4
    q = q * f + _Q5
    q = q * f + _Q6
    q = q * f + _Q7
    tail = e * _LOG2_LOW + (f * f) * q
    return e * _LOG2_HIGH + (f + tail)


@triton.jit
def gumbel(word):
    """32-bit words (int32 bit patterns) to noise (float32)."""
    folded = word ^ (word >> 31)
    t = (folded.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    exponent, mantissa = _split(tl.where(word < 0, t, 1.0 - t))
    f = tl.where(exponent == 0, 0.0 - t, mantissa - 1.0)
    exponent, mantissa = _split(0.0 - _log(exponent, f))
    return 0.0 - _log(exponent, mantissa - 1.0)


@triton.jit
def gumbel_tile(
    seed,  # scalar int64
    row,  # [R] int64
    position,  # [R] int64
    first,  # scalar int32: vocabulary index of the tile's first column, a multiple of 64
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least 64
):
    """[ROWS, COLUMNS] float32: the noise of vocabulary entries first .. first + COLUMNS - 1."""
    BLOCKS: tl.constexpr = COLUMNS // 64
    zeros = tl.zeros((ROWS, COLUMNS // 4), tl.uint32)
    counter = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :] + zeros
    row_word = row.to(tl.uint32)[:, None] + zeros
    low = position.to(tl.uint32)[:, None] + zeros
    high = (position >> 32).to(tl.uint32)[:, None] + zeros
    a, b, c, d = tl.philox(seed, counter, row_word, low, high)
    # Word j of counter 16 b + l belongs to column 64 b + 16 j + l. Two joins append j as two last
    # dimensions: [R, 16 b + l, j >> 1, j & 1].
    word = tl.join(tl.join(a, c), tl.join(b, d))
    word = word.to(tl.int32, bitcast=True)
    word = tl.reshape(word, (ROWS, BLOCKS, 16, 2, 2))
    word = tl.permute(word, (0, 1, 3, 4, 2))
    return gumbel(tl.reshape(word, (ROWS, COLUMNS)))


@triton.jit
def gumbel_noise_kernel(
    seed_ptr,  # [1] int64
    row_ptr,  # [rows] int64
    position_ptr,  # [rows] int64
    noise_ptr,  # [rows, vocabulary] float32, written
    vocabulary,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    one = place + tl.arange(0, 1)
    row = tl.load(row_ptr + one)
    position = tl.load(position_ptr + one)
    noise = gumbel_tile(tl.load(seed_ptr), row, position, first, 1, COLUMNS)
    column = first + tl.arange(0, COLUMNS)[None, :]
    tl.store(noise_ptr + place * vocabulary + column, noise, mask=column < vocabulary)


def gumbel_noise(
    seed: Tensor,  # [1] int64
    row: Tensor,  # [M] int64
    position: Tensor,  # [M] int64
    vocabulary: int,
) -> Tensor:
    """[M, vocabulary] float32."""
    rows = row.shape[0]
    noise = torch.empty((rows, vocabulary), dtype=torch.float32, device=row.device)
    if rows == 0:
        return noise
    with device_of(row):
        gumbel_noise_kernel[(rows, triton.cdiv(vocabulary, COLUMNS))](
            seed, row, position, noise, vocabulary, COLUMNS=COLUMNS, num_warps=WARPS, **FUSION
        )
    return noise
