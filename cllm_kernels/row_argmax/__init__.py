"""row_argmax: the argmax over the last dimension, with stated rules for ties and NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cllm_kernels._backend import Op, register
from cllm_kernels._common import DIRECT, FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text

_direct = None if DIRECT is None else DIRECT.direct_row_argmax


def _reference() -> Any:
    from cllm_kernels.row_argmax import reference

    return reference.row_argmax


def _cpp() -> Any:
    from cllm_kernels.row_argmax import native

    return native.row_argmax_cpu


def _triton() -> Any:
    from cllm_kernels.row_argmax import triton_kernel

    return triton_kernel.row_argmax


OP = register(
    Op(
        name="row_argmax",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def row_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index and value of the largest element of every row.

    The lowest index wins a tie (-0.0 and 0.0 tie); a NaN counts as larger than everything and the
    first NaN wins, as in torch.argmax. A row of -inf gives index 0.

    Args:
        logits: [..., V] float32, bfloat16 or float16, V >= 1, last dimension contiguous; rows may
            be strided, so a slice logits[:, -n:, :] is read in place.

    Returns:
        (index [...] int64, value [...] of the dtype of logits). No gradient flows through either.

    Raises:
        ValueError: no or an empty last dimension, or one that is not contiguous. TypeError: another
            dtype. BackendError: see `use_backend`.
    """
    if _direct is not None and not is_compiling():
        # One native call checks everything and runs; it answers None to leave the rest to do.
        threads = OP.native_threads(logits.device)
        if threads and logits.is_cpu and not logits.is_neg() and eager(logits):
            shape = logits.shape
            # torch reads one number sooner than a tuple of one.
            size = shape[0] if len(shape) == 2 else shape[:-1]
            index = torch.empty(size, dtype=torch.int64, device="cpu")
            value = torch.empty_like(index, dtype=logits.dtype)
            if _direct(logits, index, value, threads) is not None:
                return index, value
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"row_argmax: logits must be [..., V] with V >= 1, not {shape_text(logits)}"
        )
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "row_argmax: logits must be float32, bfloat16 or float16, "
            f"not {dtype_text(logits.dtype)}"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(
            f"row_argmax: the last dimension of logits {shape_text(logits)} must be contiguous "
            f"(its stride is {logits.stride(-1)}); pass logits.contiguous()"
        )
    if eager(logits) and not logits.is_neg():
        return OP.resolve(logits.device)(logits.detach() if logits.requires_grad else logits)
    return torch.ops.cllm_kernels.row_argmax.default(logits.detach())


LIBRARY.define(
    "row_argmax(Tensor logits) -> (Tensor index, Tensor value)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(logits: Tensor) -> tuple[Tensor, Tensor]:
    return OP.resolve(logits.device)(logits)


def _fake(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


LIBRARY.impl("row_argmax", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::row_argmax", _fake, lib=LIBRARY)
