"""rms_norm in Triton: a row is one block, reduced by itself, so that its bits are its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [rows, width]
    weight_ptr,  # [width]
    out_ptr,  # [rows, width], written
    width,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    real = column < width
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + column, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = (x * scale).to(kind).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + column, (weight * normed).to(kind), mask=real)


def norm_shape(width: int) -> dict[str, int]:
    """Block and launch options of `rms_norm_kernel`: a row is one block."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm(
    x: Tensor,  # [..., H] contiguous, not empty
    weight: Tensor,  # [H] contiguous
    eps: float,
) -> Tensor:
    """[..., H]. The GPU of `x` must be the current one."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    rms_norm_kernel[(x.numel() // width,)](
        *(x, weight, out), width, float(eps), **norm_shape(width), **chained(x), **FUSION
    )
    return out


def strided_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of any x [..., H] and weight [H], on the GPU that holds them."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with device_of(x):
        return rms_norm(x.contiguous(), weight.contiguous(), eps)
