"""gumbel_noise in plain PyTorch: the definition, bit for bit, of every other backend.

Vocabulary index v = 64 b + 16 j + l (j < 4, l < 16) takes word j of Philox4x32-10 with

    key      low and high word of the seed
    counter  16 b + l, row, low and high word of the position

so one call of Philox serves four entries 16 apart: sixteen neighbouring counters give four runs of
sixteen neighbouring entries, which vector registers hold as they come.

A word's noise is -log(-log(1 - w)), w = (word + 1/2) 2^-32. The large noise that wins among many
tokens comes from small w, which therefore keeps its relative precision (a 24-bit uniform would end
it at 16.6; this one at 22.9). All floating-point steps are single IEEE multiplications, additions
and subtractions in the order written here, none fused, so they round alike everywhere; a
logarithm's own library would not.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
BLOCK = 64  # vocabulary entries that 16 calls of Philox serve

# Q of log(1 + f) = f + f^2 Q(f) for sqrt(1/2) <= 1 + f < sqrt(2), highest power first: the minimax
# fit, by reweighted least squares on Chebyshev points, of degree 7, each coefficient rounded to
# fp32. As evaluated here a logarithm is off by at most 1.8 units of 2^-24 of itself.
LOG_SERIES = (
    *(0.08734846115112305, -0.14307524263858795, 0.14917974174022675, -0.16570508480072021),
    *(0.19962072372436523, -0.25001755356788635, 0.33333951234817505, -0.49999991059303284),
)
LOG2_HIGH = 0.693145751953125  # 15 bits: its product with an exponent is exact
LOG2_LOW = 1.42860677e-06
SQRT_HALF = 0x3F3504F3  # the bits of fp32 sqrt(1/2)


def _wide(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a * factor, for 32-bit numbers in int64; no product passes 2^63."""
    upper, lower = a * (factor >> 16), a * (factor & 0xFFFF)
    carried = upper + (lower >> 16)
    return carried >> 16, ((carried << 16) | (lower & 0xFFFF)) & MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 3.3).

    Counter, key and result are int64 tensors of 32-bit words that broadcast against each other.
    """
    a, b, c, d = counter
    key_a, key_c = key
    for _ in range(ROUNDS):
        high_a, low_a = _wide(a, MULTIPLIERS[0])
        high_c, low_c = _wide(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_c, low_a
        key_a, key_c = (key_a + WEYL[0]) & MASK, (key_c + WEYL[1]) & MASK
    return a, b, c, d


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2)): (exponent int32, mantissa)."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF) >> 23
    return exponent, (bits - (exponent << 23)).view(torch.float32)


def _log(exponent: Tensor, f: Tensor) -> Tensor:
    """exponent * log 2 + log(1 + f)."""
    e = exponent.to(torch.float32)
    q = torch.full_like(f, LOG_SERIES[0])
    for coefficient in LOG_SERIES[1:]:
        q = q * f + coefficient
    tail = e * LOG2_LOW + (f * f) * q
    return e * LOG2_HIGH + (f + tail)


def gumbel(word: Tensor) -> Tensor:
    """32-bit words (int64) to noise (float32)."""
    upper_half = word > 0x7FFFFFFF
    folded = torch.where(upper_half, MASK - word, word).to(torch.int32)
    t = (folded.to(torch.float32) + 0.5) * 2.0**-32  # min(w, 1 - w), both ends alike precise
    exponent, mantissa = _split(torch.where(upper_half, t, 1.0 - t))
    # Where 1 - w is near 1, t still holds what the subtraction has lost.
    f = torch.where(exponent == 0, 0.0 - t, mantissa - 1.0)
    exponent, mantissa = _split(0.0 - _log(exponent, f))
    return 0.0 - _log(exponent, mantissa - 1.0)


def gumbel_noise(
    seed: Tensor,  # [1] int64
    row: Tensor,  # [M] int64
    position: Tensor,  # [M] int64
    vocabulary: int,
) -> Tensor:
    """[M, vocabulary] float32."""
    blocks = -(-vocabulary // BLOCK)
    counter = torch.arange(16 * blocks, device=row.device)[None]  # [1, 16 blocks]
    row, position = row[:, None] & MASK, position[:, None]
    words = philox(
        (counter, row, position & MASK, (position >> 32) & MASK),
        (seed & MASK, (seed >> 32) & MASK),
    )
    # [M, 16 blocks] each -> [M, blocks, 4, 16]
    noise = torch.stack([gumbel(word).view(len(row), blocks, 16) for word in words], dim=2)
    return noise.view(len(row), blocks * BLOCK)[:, :vocabulary].contiguous()
