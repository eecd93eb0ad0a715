"""linear_argmax: the language-model head and its argmax in one op, the logits never held whole."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text


def _reference() -> Any:
    from cllm_kernels.linear_argmax import reference

    return reference.linear_argmax


def _cpp() -> Any:
    from cllm_kernels.linear_argmax import native

    return native.linear_argmax_cpu


def _triton() -> Any:
    from cllm_kernels.linear_argmax import triton_kernel

    return triton_kernel.linear_argmax


OP = register(
    Op(
        name="linear_argmax",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def linear_argmax(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """argmax over v of softcap * tanh((hidden @ weight.T + bias) / softcap), row by row.

    Scores are accumulated, biased, capped and compared in fp32. The lowest index wins a tie; a NaN
    counts as larger than everything and the first NaN wins, as in torch.argmax.

    Args:
        hidden: [M, H] float32, bfloat16 or float16; M may be 0.
        weight: [V, H] of the same dtype and device, V >= 1.
        bias: [V] float32 or of hidden's dtype, or None.
        softcap: a positive number, or None for no soft-capping (Gemma 2, Gemma Team 2024, sec. 2).

    Returns:
        (index [M] int64, value [M] float32). No gradient flows through either.

    Raises:
        ValueError: shapes or devices that do not fit, a soft-cap that is not positive and finite.
        TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    _check(hidden, weight, bias, softcap)
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if eager(*tensors) and not (hidden.is_neg() or weight.is_neg()):
        hidden = hidden.detach() if hidden.requires_grad else hidden
        return OP.resolve(hidden.device)(hidden, weight.detach(), bias, softcap)
    bias = None if bias is None else bias.detach()
    return torch.ops.cllm_kernels.linear_argmax.default(
        hidden.detach(), weight.detach(), bias, softcap
    )


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"linear_argmax: hidden must be [M, H], not {shape_text(hidden)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_argmax: weight must be [V, {hidden.shape[1]}] with V >= 1 to fit hidden "
            f"{shape_text(hidden)}, not {shape_text(weight)}"
        )
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "linear_argmax: hidden must be float32, bfloat16 or float16, "
            f"not {dtype_text(hidden.dtype)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"linear_argmax: weight is {dtype_text(weight.dtype)} but hidden is "
            f"{dtype_text(hidden.dtype)}; they must have the same dtype"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"linear_argmax: weight is on {weight.device} but hidden is on {hidden.device}"
        )
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"linear_argmax: bias must be [{weight.shape[0]}], one entry per row of weight, "
                f"not {shape_text(bias)}"
            )
        if bias.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"linear_argmax: bias must be float32 or {dtype_text(hidden.dtype)}, "
                f"not {dtype_text(bias.dtype)}"
            )
        if bias.device != hidden.device:
            raise ValueError(
                f"linear_argmax: bias is on {bias.device} but hidden is on {hidden.device}"
            )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"linear_argmax: softcap must be a positive number or None, not {softcap}")


LIBRARY.define(
    "linear_argmax(Tensor hidden, Tensor weight, Tensor? bias, float? softcap) "
    "-> (Tensor index, Tensor value)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return OP.resolve(hidden.device)(hidden, weight, bias, softcap)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=torch.float32),
    )


LIBRARY.impl("linear_argmax", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::linear_argmax", _fake, lib=LIBRARY)
