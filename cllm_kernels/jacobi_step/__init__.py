"""jacobi_step: compare a window with its predictions, commit what is exact, shift the window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cllm_kernels._backend import Op, register
from cllm_kernels._common import DIRECT, LIBRARY, dtype_text, eager, shape_text

MODES = ("sliding", "block")
ACCEPTS = ("all", "one")
_direct = None if DIRECT is None else DIRECT.direct_jacobi_step


def _reference() -> Any:
    from cllm_kernels.jacobi_step import reference

    return reference.jacobi_step


def _cpp() -> Any:
    from cllm_kernels.jacobi_step import native

    return native.jacobi_step_cpu


def _cuda() -> Any:
    from cllm_kernels.jacobi_step import native

    return native.jacobi_step_cuda


def _triton() -> Any:
    from cllm_kernels.jacobi_step import triton_kernel

    return triton_kernel.jacobi_step


OP = register(
    Op(
        name="jacobi_step",
        implementations={"reference": _reference, "cpp": _cpp, "cuda": _cuda, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def jacobi_step(
    window: Tensor,
    predictions: Tensor,
    output: Tensor,
    lengths: Tensor,
    generated: Tensor,
    progress: Tensor,
    done: Tensor,
    limits: Tensor,
    stop_ids: Tensor,
    fill: Tensor | None = None,
    *,
    mode: str = "sliding",
    accept: str = "all",
) -> Tensor:
    """Takes one forward pass's predictions into the state of a Jacobi iteration, row by row.

    A window is w[0..n-1]: w[0] is exact and not yet in the KV cache, the rest are guesses; p[i] is
    the token that the forward predicts after w[i]. p[0] is exact, and p[i] is exact if
    w[1..i] == p[0..i-1] (Santilli et al. 2023, algorithm 1; CLLM, Kou et al. 2024, section 3). The
    leading run of exact predictions is committed, up to the row's limit and its first stop token.

    Args (int64, contiguous, on one device unless said; B rows, n window slots, C output columns):
        window: [B, n], mutated to the next window. A row that ends keeps its guesses.
        predictions: [B, n].
        output: [B, C], mutated: committed tokens are written behind the earlier ones.
        lengths: [B], mutated: tokens in the KV cache before the window.
        generated: [B], mutated: tokens committed to output.
        progress: [B], mutated: leading predictions of this window that earlier iterations committed
            (block mode; 0 in sliding mode).
        done: [B] bool, mutated: rows that have ended; they are left as they are.
        limits: [B], the most tokens a row may generate, at most C.
        stop_ids: [S], S may be 0: tokens that end a row once committed.
        fill: [B, F] or None: the guess for each absolute output position, F at least the largest
            limit plus n (reads beyond F - 1 repeat the last column). None: p[n-1] is repeated.
        mode: "sliding" (the window moves on by what was accepted) or "block" (one window is
            iterated to its fixed point, then the next begins).
        accept: "all", or "one" (commit one token per step, whatever else is exact).

    Returns:
        [B] int64, the tokens that this call committed.

    Raises:
        ValueError: a shape, layout, mode or accept that does not fit, or, on the CPU, a row whose
            state is out of bounds. TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    if _direct is not None and not is_compiling():
        # One native call checks everything and runs; it answers None to leave the rest to do.
        threads = OP.native_threads(window.device)
        if threads and mode in MODES and accept in ACCEPTS:
            accepted = _direct(
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
                torch.empty_like,
                mode == "block",
                accept == "one",
                threads,
            )
            if accepted is not None:
                return accepted
    tensors = (
        *(window, predictions, output, lengths, generated, progress, limits, stop_ids),
        *(() if fill is None else (fill,)),
    )
    if mode not in MODES:
        raise ValueError(f"jacobi_step: mode must be one of {', '.join(MODES)}, not {mode!r}")
    if accept not in ACCEPTS:
        raise ValueError(f"jacobi_step: accept must be one of {', '.join(ACCEPTS)}, not {accept!r}")
    if not _fits(*tensors, done=done):
        _explain(*tensors, done=done)
    if eager(*tensors, done):
        step = OP.resolve(window.device)
    else:
        step = torch.ops.cllm_kernels.jacobi_step.default
    return step(
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
        mode,
        accept,
    )


def _fits(
    window: Tensor,
    predictions: Tensor,
    output: Tensor,
    lengths: Tensor,
    generated: Tensor,
    progress: Tensor,
    limits: Tensor,
    stop_ids: Tensor,
    fill: Tensor | None = None,
    *,
    done: Tensor,
) -> bool:
    """Whether all arguments fit together. One expression: this runs at every step of a decoding."""
    if window.dim() != 2 or output.dim() != 2 or stop_ids.dim() != 1:
        return False
    shape = window.shape
    rows, n = shape
    column = (rows,)
    device = window.device
    number = torch.int64
    fits = (
        (n >= 1 and predictions.shape == shape and output.shape[0] == rows)
        and (lengths.shape == column and generated.shape == column and progress.shape == column)
        and (limits.shape == column and done.shape == column)
        and (window.dtype is number and predictions.dtype is number and output.dtype is number)
        and (lengths.dtype is number and generated.dtype is number and progress.dtype is number)
        and (limits.dtype is number and stop_ids.dtype is number and done.dtype is torch.bool)
        and (predictions.device == device and output.device == device and done.device == device)
        and (lengths.device == device and generated.device == device and progress.device == device)
        and (limits.device == device and stop_ids.device == device)
        and (window.is_contiguous() and predictions.is_contiguous() and output.is_contiguous())
        and (lengths.is_contiguous() and generated.is_contiguous() and progress.is_contiguous())
        and (limits.is_contiguous() and stop_ids.is_contiguous() and done.is_contiguous())
    )
    if fill is None or not fits:
        return fits
    return (fill.dim() == 2 and fill.shape[0] == rows and fill.shape[1] >= n) and (
        fill.dtype is number and fill.device == device and fill.is_contiguous()
    )


def _explain(
    window: Tensor,
    predictions: Tensor,
    output: Tensor,
    lengths: Tensor,
    generated: Tensor,
    progress: Tensor,
    limits: Tensor,
    stop_ids: Tensor,
    fill: Tensor | None = None,
    *,
    done: Tensor,
) -> None:
    """Raises the error that names the first argument that does not fit."""
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"jacobi_step: window must be [B, n], n >= 1, not {shape_text(window)}")
    rows, n = window.shape
    for name, tensor, dims in (
        ("window", window, 2),
        ("predictions", predictions, 2),
        ("output", output, 2),
        ("lengths", lengths, 1),
        ("generated", generated, 1),
        ("progress", progress, 1),
        ("done", done, 1),
        ("limits", limits, 1),
        ("stop_ids", stop_ids, 1),
        ("fill", fill, 2),
    ):
        if tensor is None:
            continue
        fits = tensor.dim() == dims and (name == "stop_ids" or tensor.shape[0] == rows)
        if not fits or (name == "predictions" and tensor.shape[1] != n):
            raise ValueError(_shape_error(name, tensor, rows, n))
        wanted = torch.bool if name == "done" else torch.int64
        if tensor.dtype is not wanted:
            raise TypeError(
                f"jacobi_step: {name} must be {dtype_text(wanted)}, not {dtype_text(tensor.dtype)}"
            )
        if tensor.device != window.device:
            raise ValueError(
                f"jacobi_step: {name} is on {tensor.device} but window is on {window.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"jacobi_step: {name} must be contiguous; pass {name}.contiguous()")
    if fill is not None and fill.shape[1] < n:
        raise ValueError(
            f"jacobi_step: fill must have at least limits.max() + n columns, but "
            f"{shape_text(fill)} has fewer than n = {n}"
        )


def _shape_error(name: str, tensor: Tensor, rows: int, n: int) -> str:
    wanted = {
        "predictions": f"[{rows}, {n}], the window's shape",
        "output": f"[{rows}, C]",
        "fill": f"[{rows}, F]",
        "stop_ids": "[S]",
    }.get(name, f"[{rows}], one entry per row of window")
    return f"jacobi_step: {name} must be {wanted}, not {shape_text(tensor)}"


# Not "mode": torch's tracing hands an argument of that name to the kernels it wraps.
LIBRARY.define(
    "jacobi_step(Tensor(a!) window, Tensor predictions, Tensor(b!) output, Tensor(c!) lengths, "
    "Tensor(d!) generated, Tensor(e!) progress, Tensor(f!) done, Tensor limits, Tensor stop_ids, "
    "Tensor? fill, str step_mode, str accept) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(window: Tensor, *rest: Any) -> Tensor:
    return OP.resolve(window.device)(window, *rest)


def _fake(window: Tensor, predictions: Tensor, output: Tensor, lengths: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(lengths)


LIBRARY.impl("jacobi_step", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::jacobi_step", _fake, lib=LIBRARY)
