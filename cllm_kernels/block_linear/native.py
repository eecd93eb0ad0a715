"""block_linear in C++: addresses, sizes and strides handed to _C."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module

_C = native_module()


def block_linear_cpu(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [N, H]
    bias: Tensor | None,  # [N]
    a: Tensor | None,  # [R, H]
    b: Tensor | None,  # [N, R]
    gated_from: int,
) -> Tensor:
    """[..., N] of x's dtype."""
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="cpu")
    # counted: -1 could be any number where a size is 0
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    gate = None
    if a is not None and b is not None:
        gate = (a.contiguous(), b.contiguous(), x.shape[-2], gated_from)
    linear_into(out.view(rows.shape[0], weight.shape[0]), rows, weight, bias, gate)
    return out


def linear_into(
    out: Tensor,  # [M, N] float32 or of x's dtype, last dimension contiguous, written
    x: Tensor,  # [M, H]
    weight: Tensor,  # [N, H]
    bias: Tensor | None = None,  # [N]
    gate: tuple[Tensor, Tensor, int, int] | None = None,  # a [R, H], b [N, R], period, first row
) -> None:
    """x @ weight.T + bias, and (x @ a.T) @ b.T in rows whose index modulo the period is at least
    that of the first gated one."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    # a low-rank term is added in sums that only the other way of lying has
    across = gate is None and _lies_across(weight)
    weight = weight if across or weight.stride(-1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    a, b, period, first = (None, None, 1, 0) if gate is None else gate
    tensors = (x, weight, bias, out, a, b)
    _C.block_linear_cpu(
        tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[out.dtype],
        (x.shape[0], weight.shape[0], x.shape[1], 0 if a is None else a.shape[0]),
        (x.stride(0), weight.stride(1 if across else 0), out.stride(0)),
        (period, first),
        across,
        torch.get_num_threads(),
    )


def _lies_across(weight: Tensor) -> bool:
    """Whether a weight [N, H] is the transpose of one in memory, as GPT-2's Conv1D has it."""
    rows, columns = weight.shape
    stride, step = weight.stride()
    return rows > 1 and columns > 1 and stride == 1 and step >= rows
