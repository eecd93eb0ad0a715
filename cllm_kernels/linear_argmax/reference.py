"""linear_argmax in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import without_autocast
from cllm_kernels.gumbel_noise.arguments import check_row_ids
from cllm_kernels.gumbel_noise.reference import gumbel_noise


@without_autocast
def linear_argmax(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
    temperature: float | None,
    seed: Tensor | None,  # [1] int64
    row: Tensor | None,  # [M] int64
    position: Tensor | None,  # [M] int64
) -> tuple[Tensor, Tensor]:
    """argmax over v of softcap(hidden @ weight.T + bias) / temperature + noise, all in fp32."""
    scores = hidden.float() @ weight.float().T  # [M, V]
    if bias is not None:
        scores = scores + bias.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if temperature is not None:
        # The reciprocal, rounded to fp32, and one multiplication: GPUs divide less exactly.
        scores = scores * (1.0 / temperature)
    if seed is not None and row is not None and position is not None:
        check_row_ids("linear_argmax", row)
        scores = scores + gumbel_noise(seed, row, position, weight.shape[0])
    index = scores.argmax(dim=-1)
    return index, scores.gather(-1, index[:, None])[:, 0]
