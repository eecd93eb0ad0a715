"""jacobi_step: compare a window with its predictions, commit what is exact, shift the window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, dtype_text, eager, shape_text

MODES = ("sliding", "block")
ACCEPTS = ("all", "one")


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
    _check(
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
    if eager(
        window, predictions, output, lengths, generated, progress, done, limits, stop_ids
    ) and (fill is None or eager(fill)):
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


def _check(
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
    mode: str,
    accept: str,
) -> None:
    if mode not in MODES:
        raise ValueError(f"jacobi_step: mode must be one of {', '.join(MODES)}, not {mode!r}")
    if accept not in ACCEPTS:
        raise ValueError(f"jacobi_step: accept must be one of {', '.join(ACCEPTS)}, not {accept!r}")
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"jacobi_step: window must be [B, n], n >= 1, not {shape_text(window)}")
    rows, n = window.shape
    for name, tensor, dims, columns in (
        ("window", window, 2, n),
        ("predictions", predictions, 2, n),
        ("output", output, 2, None),
        ("lengths", lengths, 1, None),
        ("generated", generated, 1, None),
        ("progress", progress, 1, None),
        ("done", done, 1, None),
        ("limits", limits, 1, None),
        ("stop_ids", stop_ids, 1, None),
        ("fill", fill, 2, None),
    ):
        if tensor is None:
            continue
        shape = tensor.shape
        fits = len(shape) == dims and (columns is None or shape[1] == columns)
        if not fits or (shape[0] != rows and tensor is not stop_ids):
            raise ValueError(_shape_error(name, tensor, rows, n))
        if tensor.dtype is not (torch.bool if tensor is done else torch.int64):
            wanted = "bool" if tensor is done else "int64"
            raise TypeError(f"jacobi_step: {name} must be {wanted}, not {dtype_text(tensor.dtype)}")
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
