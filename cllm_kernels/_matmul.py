"""What the ops need to know of torch's own matrix products."""

from __future__ import annotations

from functools import cache

import torch


@cache
def fast_cpu_matmul(dtype: torch.dtype) -> bool:
    """Whether torch's CPU matmul in this 16-bit dtype uses instructions made for it."""
    name = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }[dtype]
    supported = (
        getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    )
    return bool(supported is not None and supported())
