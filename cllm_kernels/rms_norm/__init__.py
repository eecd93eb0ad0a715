"""rms_norm: the norm of Llama's layers, rounded where HuggingFace's modules round."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text


def _reference() -> Any:
    from cllm_kernels.rms_norm import reference

    return reference.rms_norm


def _cpp() -> Any:
    from cllm_kernels.rms_norm import native

    return native.rms_norm_cpu


def _triton() -> Any:
    from cllm_kernels.rms_norm import triton_kernel

    return triton_kernel.strided_rms_norm


OP = register(
    Op(
        name="rms_norm",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    Rounded as in HuggingFace's LlamaRMSNorm: mean and quotient in fp32, the quotient rounded to x's
    dtype, then times the weight and rounded again. In C++ and in Triton, one launch, a row's
    result has the same bits beside any other rows, and for any number of them.

    Args:
        x: [..., H] float32, bfloat16 or float16, H >= 1; any strides.
        weight: [H] of the same dtype and device.
        eps: at least 0.

    Returns:
        [..., H] of x's dtype, contiguous. Where a gradient is wanted (grad mode is on and an
        argument requires it), this is made of torch's own operations.

    Raises:
        ValueError: shapes or devices that do not fit, or an eps below 0. TypeError: another dtype,
            or several. BackendError: see `use_backend`.
    """
    _check(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _reference()(x, weight, eps)
    if eager(x, weight):
        given = (x.detach().resolve_neg(), weight.detach().resolve_neg())
        return OP.resolve(x.device)(*given, eps)
    return torch.ops.cllm_kernels.rms_norm.default(x, weight, eps)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm: x must be [..., H] with H >= 1, not {shape_text(x)}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"rms_norm: weight must be [{x.shape[-1]}] to fit x {shape_text(x)}, "
            f"not {shape_text(weight)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"rms_norm: x must be float32, bfloat16 or float16, not {dtype_text(x.dtype)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"rms_norm: weight is {dtype_text(weight.dtype)} but x is {dtype_text(x.dtype)}; "
            "they must have the same dtype"
        )
    if weight.device != x.device:
        raise ValueError(f"rms_norm: weight is on {weight.device} but x is on {x.device}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"rms_norm: eps must be finite and at least 0, not {eps}")


LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return OP.resolve(x.device)(x, weight, eps)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("rms_norm", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::rms_norm", _fake, lib=LIBRARY)
