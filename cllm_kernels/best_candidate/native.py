"""best_candidate in C++: addresses and sizes handed to _C."""

from __future__ import annotations

from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def best_candidate_cpu(
    windows: Tensor,  # [B, C, n]
    predictions: Tensor,  # [B, C, n]
    guesses: Tensor | None,  # [B, C, n]
) -> tuple[Tensor, Tensor]:  # [B], [2 or 3, B, n]
    """The C++ kernel, on one thread: a row takes nanoseconds."""
    rows, count, n = windows.shape
    candidate = windows.new_empty(rows)
    kept = windows.new_empty(2 if guesses is None else 3, rows, n)
    _C.best_candidate_cpu(
        windows.data_ptr(),
        predictions.data_ptr(),
        0 if guesses is None else guesses.data_ptr(),
        candidate.data_ptr(),
        kept.data_ptr(),
        rows,
        count,
        n,
    )
    return candidate, kept
