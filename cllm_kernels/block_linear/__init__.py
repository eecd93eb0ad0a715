"""block_linear: a linear layer for the few rows of a block, whose bits no other row can change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cllm_kernels._backend import Op, register
from cllm_kernels._common import DIRECT, FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text

_direct = None if DIRECT is None else DIRECT.direct_block_linear


def _reference() -> Any:
    from cllm_kernels.block_linear import reference

    return reference.block_linear


def _cpp() -> Any:
    from cllm_kernels.block_linear import native

    return native.block_linear_cpu


def _triton() -> Any:
    from cllm_kernels.block_linear import triton_kernel

    return triton_kernel.block_linear


OP = register(
    Op(
        name="block_linear",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    gated_from: int = 0,
) -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear, made for 1 to 64 rows.

    Sums are fp32 and rounded once, to x's dtype. On the C++ backend a row's result has the same
    bits beside any other rows, and for any number of them: what is summed in which order depends
    on H alone. So it was in Triton in 16 bits on an H200, for up to 64 rows in all; what its kernel
    is not made for (fp32, more rows, H that 16 does not divide) is torch's own product there.

    Args:
        x: [..., H] float32, bfloat16 or float16.
        weight: [N, H] and bias: [N] or None, of the same dtype and device. The transpose of a
            [H, N] in memory is read as it lies there on a CPU, where there is no `low_rank`.
        low_rank: (a [R, H], b [N, R]) of the same dtype and device, finite, or None. The rows
            x[..., gated_from:, :] get (x @ a.T) @ b.T on top (LoRA, Hu et al. 2021, eq. 3); the
            others keep the bits that they have without it.
        gated_from: the first row, of the second to last dimension, that gets the term.

    Returns:
        [..., N] of x's dtype, under torch.autocast, too. Where a gradient is wanted (grad mode is
        on and an argument requires it), this is made of torch.nn.functional.linear itself.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: another dtype, or several.
        BackendError: see `use_backend`.
    """
    a, b = (None, None) if low_rank is None else low_rank
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, a, b)
    ):
        _check(x, weight, bias, a, b, gated_from)
        return _reference()(x, weight, bias, a, b, gated_from)
    if _direct is not None and gated_from >= 0 and not is_compiling():
        # One native call checks everything and runs; it answers None to leave the rest to do.
        threads = OP.native_threads(x.device)
        negated = x.is_neg() or weight.is_neg() or (bias is not None and bias.is_neg())
        if a is not None and b is not None:
            negated = negated or a.is_neg() or b.is_neg()
        if threads and x.is_cpu and weight.dim() == 2 and not negated:
            out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="cpu")
            if _direct(x, weight, bias, a, b, out, gated_from, threads) is not None:
                return out
    _check(x, weight, bias, a, b, gated_from)
    tensors = (x, weight, bias, a, b)
    if eager(*(tensor for tensor in tensors if tensor is not None)):
        resolved = (None if tensor is None else tensor.detach().resolve_neg() for tensor in tensors)
        return OP.resolve(x.device)(*resolved, gated_from)
    return torch.ops.cllm_kernels.block_linear.default(*tensors, gated_from)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gated_from: int,
) -> None:
    if x.dim() < 1:
        raise ValueError(f"block_linear: x must be [..., H], not {shape_text(x)}")
    width, columns = x.shape[-1], weight.shape[0] if weight.dim() else 0
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"block_linear: weight must be [N, {width}] to fit x {shape_text(x)}, "
            f"not {shape_text(weight)}"
        )
    if bias is not None and bias.shape != (columns,):
        raise ValueError(
            f"block_linear: bias must be [{columns}], one entry per row of weight, "
            f"not {shape_text(bias)}"
        )
    if (a is None) != (b is None):
        raise ValueError("block_linear: low_rank must be (a, b) or None, not half of it")
    if a is not None and b is not None:
        if a.dim() != 2 or a.shape[1] != width or b.shape != (columns, a.shape[0]):
            raise ValueError(
                f"block_linear: low_rank must be a [R, {width}] and b [{columns}, R], "
                f"not {shape_text(a)} and {shape_text(b)}"
            )
        if x.dim() < 2 or not 0 <= gated_from <= x.shape[-2]:
            raise ValueError(
                f"block_linear: gated_from must be a row of x {shape_text(x)}, not {gated_from}"
            )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"block_linear: x must be float32, bfloat16 or float16, not {dtype_text(x.dtype)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("low_rank", a), ("low_rank", b)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"block_linear: {name} is {dtype_text(tensor.dtype)} but x is "
                f"{dtype_text(x.dtype)}; they must have the same dtype"
            )
        if tensor.device != x.device:
            raise ValueError(f"block_linear: {name} is on {tensor.device} but x is on {x.device}")


LIBRARY.define(
    "block_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, int gated_from) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gated_from: int,
) -> Tensor:
    return OP.resolve(x.device)(x, weight, bias, a, b, gated_from)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gated_from: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LIBRARY.impl("block_linear", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::block_linear", _fake, lib=LIBRARY)
