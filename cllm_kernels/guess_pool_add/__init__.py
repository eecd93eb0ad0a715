"""guess_pool_add: keep what a forward predicted behind every token of its window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, check_int64, eager, shape_text


def _reference() -> Any:
    from cllm_kernels.guess_pool_add import reference

    return reference.guess_pool_add


def _cpp() -> Any:
    from cllm_kernels.guess_pool_add import native

    return native.guess_pool_add_cpu


def _triton() -> Any:
    from cllm_kernels.guess_pool_add import triton_kernel

    return triton_kernel.guess_pool_add


OP = register(
    Op(
        name="guess_pool_add",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def guess_pool_add(latest: Tensor, stamps: Tensor, window: Tensor, predictions: Tensor) -> None:
    """Makes predictions[b, i] the latest token behind window[b, i], for `guess_window` to read.

    An entry is stamp * V + token, the larger of two stays, and stamps rise along the window and
    from call to call: so of a token that stands in a window twice the later prediction is kept, in
    whatever order a device writes. Tokens outside of [0, V) are left out.

    Args (int64, contiguous, on one device; B rows):
        latest: [B, V], mutated; -1 where no token is known.
        stamps: [B], mutated: the stamp of each row's next entry, at least 0; n higher afterwards.
        window: [B, n].
        predictions: [B, n].

    Raises:
        ValueError: a shape, layout or device that does not fit. TypeError: a wrong dtype.
        BackendError: see `use_backend`.
    """
    tensors = (latest, stamps, window, predictions)
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"guess_pool_add: window must be [B, n], n >= 1, not {shape_text(window)}")
    rows, n = window.shape
    if latest.dim() != 2 or latest.shape[0] != rows or latest.shape[1] < 1:
        raise ValueError(
            f"guess_pool_add: latest must be [{rows}, V], V >= 1, not {shape_text(latest)}"
        )
    if stamps.shape != (rows,):
        raise ValueError(
            f"guess_pool_add: stamps must be [{rows}], one entry per row of window, "
            f"not {shape_text(stamps)}"
        )
    if predictions.shape != window.shape:
        raise ValueError(
            f"guess_pool_add: predictions must be [{rows}, {n}], the window's shape, "
            f"not {shape_text(predictions)}"
        )
    check_int64(
        *("guess_pool_add", ("window", window)),
        latest=latest,
        stamps=stamps,
        window=window,
        predictions=predictions,
    )
    if eager(*tensors):
        OP.resolve(window.device)(*tensors)
    else:
        torch.ops.cllm_kernels.guess_pool_add.default(*tensors)


LIBRARY.define(
    "guess_pool_add(Tensor(a!) latest, Tensor(b!) stamps, Tensor window, Tensor predictions) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(latest: Tensor, *rest: Tensor) -> None:
    OP.resolve(latest.device)(latest, *rest)


def _fake(*_: Tensor) -> None:
    return None


LIBRARY.impl("guess_pool_add", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::guess_pool_add", _fake, lib=LIBRARY)
