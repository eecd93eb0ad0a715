"""row_argmax in C++: addresses, sizes and strides handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module
from cllm_kernels.row_argmax.layout import row_layout

_C = native_module()


def row_argmax_cpu(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., V] -> (index [...], value [...])."""
    shape = logits.shape[:-1]
    index = torch.empty(shape, dtype=torch.int64, device="cpu")
    value = torch.empty(shape, dtype=logits.dtype, device="cpu")
    layout = row_layout(logits)
    if layout.rows:
        _C.row_argmax_cpu(
            layout.logits.data_ptr(),
            DTYPE_CODES[logits.dtype],
            layout.rows,
            layout.inner,
            layout.outer_stride,
            layout.inner_stride,
            layout.columns,
            index.data_ptr(),
            value.data_ptr(),
            torch.get_num_threads(),
        )
    return index, value
