"""block_linear in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import without_autocast


@without_autocast
def block_linear(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [N, H]
    bias: Tensor | None,  # [N]
    a: Tensor | None,  # [R, H]
    b: Tensor | None,  # [N, R]
    gated_from: int,
) -> Tensor:
    """[..., N] of x's dtype."""
    out = torch.nn.functional.linear(x, weight, bias)
    if a is None or b is None:
        return out
    term = torch.nn.functional.linear(torch.nn.functional.linear(x[..., gated_from:, :], a), b)
    return torch.cat([out[..., :gated_from, :], out[..., gated_from:, :] + term], dim=-2)
