"""Tiny models whose whole forward is in fp64: transformers' own norms and eager softmax go through
fp32, and its rounding would hide a difference of 1e-8."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.decoding.tiny_models import tiny_model

FAMILIES = ["llama", "qwen2", "qwen2-local", "gemma2", "gpt2"]


class _Norm(torch.nn.Module):
    """Root-mean-square norm in the dtype of its input."""

    def __init__(self, norm: Any, offset: float):
        super().__init__()
        self.weight = norm.weight
        self.offset = offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return hidden * scale * (self.offset + self.weight)


def exact_model(family: str = "llama", attention: str | None = None) -> Any:
    """A fresh fp64 model; soft-capped attention (Gemma 2) is eager's, since SDPA does not know it.
    Use it with the fixture `exact_softmax`."""
    model = copy.deepcopy(tiny_model(family, torch.float64))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                offset = 1.0 if "Gemma" in type(child).__name__ else 0.0
                setattr(parent, name, _Norm(child, offset))
    model.set_attn_implementation(attention or ("eager" if family == "gemma2" else "sdpa"))
    return model
