"""Pieces that the Triton kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fusing a multiply with an add rounds once instead of twice. Triton's default for it changes
# between releases, and a score's bits decide ties: it is stated with every launch.
FUSION = {"enable_fp_fusion": False}


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one inside: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _starts_early(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def chained(tensor: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that calls `await_inputs`. From Hopper on it is started while the
    kernel before it on the stream still runs (programmatic dependent launch), so that the one's
    beginning is hidden by the other's end."""
    early = _starts_early(tensor.device)
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """To be called before anything is read that another kernel may have written, or written at
    all: waits for all kernels before this one, and lets the next one start as far as its own
    call. Kernels that are not `chained` wait by themselves."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def tanh(x):
    """tanh without a device library. Near 0 its Taylor series: (1 - t) / (1 + t) would cancel."""
    magnitude = tl.abs(x)
    t = tl.exp(-2.0 * magnitude)
    large = (1.0 - t) / (1.0 + t)
    large = tl.where(x < 0, -large, large)
    square = x * x
    series = 62.0 / 2835.0 * square - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    small = x + x * square * series
    return tl.where(magnitude < 0.25, small, large)


@triton.jit
def better(score, index, best, best_index):
    """The winner of two (score, index): NaN over everything, then larger, then lower index."""
    score_nan = score != score
    best_nan = best != best
    above = (score > best) | (score_nan & (best_nan == 0))
    equal = (score == best) | (score_nan & best_nan)
    take = above | (equal & (index < best_index))
    return tl.where(take, score, best), tl.where(take, index, best_index)


@triton.jit
def tile_argmax(scores, columns, valid, NONE: tl.constexpr):
    """Winner of each row of a tile: scores, columns (index of each element) and valid, all [R, C].

    Returns (value [R], index [R]); a row without valid elements gives (-inf, NONE).
    """
    nan = (scores != scores) & valid
    finite = tl.where(valid & (nan == 0), scores, float("-inf"))
    largest = tl.max(finite, axis=1)
    first = tl.min(tl.where(valid & (finite == largest[:, None]), columns, NONE), axis=1)
    first_nan = tl.min(tl.where(nan, columns, NONE), axis=1)
    has_nan = first_nan < NONE
    value = tl.where(has_nan, float("nan"), largest)
    return value, tl.where(has_nan, first_nan, first)
