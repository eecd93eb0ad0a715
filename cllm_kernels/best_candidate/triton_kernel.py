"""best_candidate in Triton: one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of

WARPS = 1


@triton.jit
def best_candidate_kernel(
    windows_ptr,  # [B, count, n] int64
    predictions_ptr,  # [B, count, n] int64
    guesses_ptr,  # [B, count, n] int64, unread unless HAS_GUESSES
    candidate_ptr,  # [B] int64, written
    kept_ptr,  # [2, B, n] int64, or [3, B, n] where HAS_GUESSES, written
    count,
    n,
    HAS_GUESSES: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SLOTS)
    begin = row * count * n
    best = row - row
    most = best - 1
    for one in range(0, count):
        place = begin + one * n + i
        guess = tl.load(windows_ptr + place + 1, mask=i + 1 < n, other=0)
        token = tl.load(predictions_ptr + place, mask=i + 1 < n, other=0)
        wrong = (i + 1 >= n) | (guess != token)
        right = tl.min(tl.where(wrong, i, SLOTS), axis=0).to(tl.int64)
        better = right > most
        best = tl.where(better, one, best)
        most = tl.where(better, right, most)
    tl.store(candidate_ptr + row, best)
    place = begin + best * n + i
    kept = kept_ptr + row * n + i
    inside = i < n
    part = tl.num_programs(0).to(tl.int64) * n
    tl.store(kept, tl.load(windows_ptr + place, mask=inside), mask=inside)
    tl.store(kept + part, tl.load(predictions_ptr + place, mask=inside), mask=inside)
    if HAS_GUESSES:
        tl.store(kept + 2 * part, tl.load(guesses_ptr + place, mask=inside), mask=inside)


def best_candidate(
    windows: Tensor,  # [B, C, n]
    predictions: Tensor,  # [B, C, n]
    guesses: Tensor | None,  # [B, C, n]
) -> tuple[Tensor, Tensor]:  # [B], [2 or 3, B, n]
    """Launches the kernel; nothing is read back."""
    rows, count, n = windows.shape
    candidate = windows.new_empty(rows)
    kept = windows.new_empty(2 if guesses is None else 3, rows, n)
    if rows == 0:
        return candidate, kept
    with device_of(windows):
        best_candidate_kernel[(rows,)](
            windows,
            predictions,
            windows if guesses is None else guesses,
            candidate,
            kept,
            count,
            n,
            HAS_GUESSES=guesses is not None,
            SLOTS=triton.next_power_of_2(n),
            num_warps=WARPS,
            **chained(windows),
            **FUSION,
        )
    return candidate, kept
