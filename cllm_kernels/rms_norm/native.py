"""rms_norm in C++: addresses and sizes handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module

_C = native_module()


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H], contiguous."""
    rows, scale = x.contiguous(), weight.contiguous()
    out = torch.empty_like(rows)
    width = rows.shape[-1]
    if count := rows.numel() // width:
        _C.rms_norm_cpu(
            rows.data_ptr(),
            scale.data_ptr(),
            DTYPE_CODES[rows.dtype],
            count,
            width,
            eps,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out
