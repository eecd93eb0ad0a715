"""Adapters of several kinds for the tiny models."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch

from cllm import GatedAdapter
from cllm.adapter import LowRank

from ..decoding.tiny_models import tiny_model


def peft_model(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny model with a random LoRA adapter, in eval mode."""
    from peft import LoraConfig, get_peft_model

    chosen: dict[str, Any] = dict(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model(family, dtype))
    return get_peft_model(model, LoraConfig(**(chosen | settings))).eval()


def scaled(adapter: GatedAdapter, factor: float) -> GatedAdapter:
    """The same adapter, `factor` times as strong."""
    weights = {
        name: LowRank(pair.a, pair.b, pair.scaling * factor)
        for name, pair in adapter.weights.items()
    }
    return GatedAdapter(weights, adapter.metadata)


def digest(model: Any) -> str:
    """Of every bit of a model's parameters."""
    found = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
