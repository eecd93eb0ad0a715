"""guess_pool_add in C++: addresses and sizes handed to _C."""

from __future__ import annotations

from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def guess_pool_add_cpu(
    latest: Tensor,  # [B, V], mutated
    stamps: Tensor,  # [B], mutated
    window: Tensor,  # [B, n]
    predictions: Tensor,  # [B, n]
) -> None:
    """The C++ kernel, on one thread: a row takes nanoseconds."""
    rows, n = window.shape
    _C.guess_pool_add_cpu(
        latest.data_ptr(),
        stamps.data_ptr(),
        window.data_ptr(),
        predictions.data_ptr(),
        rows,
        n,
        latest.shape[1],
    )
