"""gumbel_noise in C++: addresses and sizes handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def gumbel_noise_cpu(
    seed: Tensor,  # [1] int64
    row: Tensor,  # [M] int64
    position: Tensor,  # [M] int64
    vocabulary: int,
) -> Tensor:
    """[M, vocabulary] float32."""
    rows = row.shape[0]
    noise = torch.empty((rows, vocabulary), dtype=torch.float32, device="cpu")
    _C.gumbel_noise_cpu(
        seed.data_ptr(),
        row.data_ptr(),
        position.data_ptr(),
        rows,
        vocabulary,
        noise.data_ptr(),
        torch.get_num_threads(),
    )
    return noise
