"""draft_window in C++: addresses and sizes handed to _C."""

from __future__ import annotations

from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def draft_window_cpu(
    window: Tensor,  # [B, n], written
    checked: Tensor,  # [B, v]
    guesses: Tensor,  # [B, n]
    accepted: Tensor,  # [B]
    generated: Tensor,  # [B]
    progress: Tensor | None,  # [B]
    fill: Tensor | None,  # [B, F]
) -> None:
    """The C++ kernel, on one thread: a row takes nanoseconds."""
    rows, n = window.shape
    _C.draft_window_cpu(
        window.data_ptr(),
        checked.data_ptr(),
        guesses.data_ptr(),
        accepted.data_ptr(),
        generated.data_ptr(),
        0 if progress is None else progress.data_ptr(),
        0 if fill is None else fill.data_ptr(),
        rows,
        n,
        checked.shape[1],
        0 if fill is None else fill.shape[1],
    )
