"""jacobi_step in C++ (CPU) and CUDA C++: addresses and sizes handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def _arguments(
    window: Tensor,
    predictions: Tensor,
    output: Tensor,
    lengths: Tensor,
    generated: Tensor,
    progress: Tensor,
    done: Tensor,
    limits: Tensor,
    stop_ids: Tensor,
    fill: Tensor | None,
    accepted: Tensor,
    mode: str,
    accept: str,
) -> tuple:
    rows, n = window.shape
    return (
        window.data_ptr(),
        predictions.data_ptr(),
        output.data_ptr(),
        lengths.data_ptr(),
        generated.data_ptr(),
        progress.data_ptr(),
        done.data_ptr(),
        limits.data_ptr(),
        stop_ids.data_ptr(),
        0 if fill is None else fill.data_ptr(),
        accepted.data_ptr(),
        rows,
        n,
        output.shape[1],
        stop_ids.shape[0],
        0 if fill is None else fill.shape[1],
        mode == "block",
        accept == "one",
    )


def jacobi_step_cpu(
    window: Tensor,  # [B, n], mutated
    predictions: Tensor,  # [B, n]
    output: Tensor,  # [B, C], mutated
    lengths: Tensor,  # [B], mutated
    generated: Tensor,  # [B], mutated
    progress: Tensor,  # [B], mutated
    done: Tensor,  # [B] bool, mutated
    limits: Tensor,  # [B]
    stop_ids: Tensor,  # [S]
    fill: Tensor | None,  # [B, F]
    mode: str,
    accept: str,
) -> Tensor:
    """The C++ kernel. Raises ValueError, naming the row, if a row's state is out of bounds."""
    accepted = torch.empty_like(lengths)
    arguments = _arguments(
        window,
        predictions,
        output,
        lengths,
        generated,
        progress,
        done,
        limits,
        stop_ids,
        fill,
        accepted,
        mode,
        accept,
    )
    bad = _C.jacobi_step_cpu(*arguments, torch.get_num_threads())
    if bad >= 0:
        raise ValueError(
            f"jacobi_step: row {bad} is out of bounds: progress {int(progress[bad])} must lie in "
            f"[0, {window.shape[1]}), generated {int(generated[bad])} in [0, {output.shape[1]}], "
            f"the output's columns, which limits {int(limits[bad])} must not exceed"
        )
    return accepted


def jacobi_step_cuda(
    window: Tensor,  # [B, n], mutated
    predictions: Tensor,  # [B, n]
    output: Tensor,  # [B, C], mutated
    lengths: Tensor,  # [B], mutated
    generated: Tensor,  # [B], mutated
    progress: Tensor,  # [B], mutated
    done: Tensor,  # [B] bool, mutated
    limits: Tensor,  # [B]
    stop_ids: Tensor,  # [S]
    fill: Tensor | None,  # [B, F]
    mode: str,
    accept: str,
) -> Tensor:
    """The CUDA kernel, on torch's current stream; returns before it has run."""
    accepted = torch.empty_like(lengths)
    arguments = _arguments(
        window,
        predictions,
        output,
        lengths,
        generated,
        progress,
        done,
        limits,
        stop_ids,
        fill,
        accepted,
        mode,
        accept,
    )
    device = window.device
    _C.jacobi_step_cuda(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)
    return accepted
