"""A model's final norm through `cllm_kernels.rms_norm`, around native decoder layers.

torch's mean adds up a row in an order that depends on how many rows stand beside it, so that in 16
bits a token's bits change with the block size; and the module's forward is eight operations.
"""

from __future__ import annotations

from typing import Any

import torch

import cllm_kernels
from cllm_kernels._common import FLOAT_DTYPES


class NativeNorm:
    """A norm of the Llama kind, and the forward that takes its place."""

    def __init__(self, norm: Any):
        self.own = norm.forward
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] -> the same, as the module's own forward."""
        weight = self.norm.weight
        # a norm kept in fp32 in a model of 16 bits gives fp32
        if hidden_states.dtype != weight.dtype or weight.dtype not in FLOAT_DTYPES:
            return self.own(hidden_states)
        return cllm_kernels.rms_norm(hidden_states, weight, eps=self.norm.variance_epsilon)
