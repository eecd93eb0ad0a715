"""linear_argmax in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_argmax(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """argmax over v of softcap * tanh((hidden @ weight.T + bias) / softcap), all in fp32."""
    logits = hidden.float() @ weight.float().T  # [M, V]
    if bias is not None:
        logits = logits + bias.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    index = logits.argmax(dim=-1)
    return index, logits.gather(-1, index[:, None])[:, 0]
