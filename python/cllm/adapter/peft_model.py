"""PEFT models in memory: their LoRA weights, and how to run them as the plain base."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..traits import unwrapped
from .errors import AdapterError
from .peft_format import refuse_config
from .weights import LowRank

_lock = threading.Lock()
# id of a PEFT layer -> (calls that have its adapters off right now, what it was before)
_off: dict[int, tuple[int, bool]] = {}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Run `model` without the PEFT adapters that it may carry, for a while.

    Unlike PEFT's own ``disable_adapter``, this leaves ``requires_grad`` alone, so it may stand in
    the middle of a training run; and the last of several concurrent calls puts the state back.
    Adapters are off for all threads meanwhile: forwards that are to have them wait their turn.

    Raises:
        AdapterError: if adapters are merged into the weights: there is no base left to run.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    refuse_merged(layers)
    with _lock:
        for layer in layers:
            users, before = _off.get(id(layer), (0, layer._disable_adapters))
            _off[id(layer)] = users + 1, before
            layer._disable_adapters = True
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                users, before = _off[id(layer)]
                if users > 1:
                    _off[id(layer)] = users - 1, before
                else:
                    del _off[id(layer)]
                    layer._disable_adapters = before


def refuse_merged(layers: list[Any]) -> None:
    """Raises AdapterError if any of these PEFT layers has an adapter merged into its weights."""
    if any(getattr(layer, "merged", False) is True for layer in layers):
        raise AdapterError(
            "the adapter is merged into the base weights, so there is no base left to decide the "
            "text; call unmerge_adapter(), or load the base model and the adapter anew"
        )


def live_weights(model: Any, adapter_name: str | None) -> tuple[dict[str, LowRank], str]:
    """The LoRA weights of a PEFT model by module name, sharing its tensors, and their adapter's
    name.

    Raises:
        AdapterError: no LoRA layer (merged and unloaded, say), several adapters to choose from,
            an adapter merged into the weights, or a kind of LoRA that is not a plain one.
    """
    base = unwrapped(model)
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict)
    }
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA layers: it never had an adapter, or the adapter "
            "was merged and unloaded; pass the PEFT model from before, or the adapter's folder"
        )
    refuse_merged(list(layers.values()))
    names = sorted({key for layer in layers.values() for key in _adapters(layer)})
    if adapter_name is None:
        active = list(next(iter(layers.values())).active_adapters)
        if len(active) != 1:
            raise AdapterError(
                f"the model has {len(active)} active adapters ({', '.join(active) or 'none'}); "
                "make a GatedAdapter.from_peft(model, adapter_name=...) of one of them"
            )
        adapter_name = active[0]
    if adapter_name not in names:
        raise AdapterError(f"no adapter is called {adapter_name!r}; there are {', '.join(names)}")
    configs = getattr(model, "peft_config", None) or getattr(base, "peft_config", {})
    if adapter_name in configs:
        refuse_config(configs[adapter_name].to_dict())
    weights = {}
    for name, layer in layers.items():
        if adapter_name in getattr(layer, "lora_embedding_A", {}):
            raise AdapterError(f"the adapter targets the embedding {name}; gate linear layers only")
        if adapter_name in layer.lora_A:
            weights[name] = LowRank(
                layer.lora_A[adapter_name].weight.detach(),
                layer.lora_B[adapter_name].weight.detach(),
                float(layer.scaling[adapter_name]),
            )
    return weights, adapter_name


def _adapters(layer: Any) -> set[str]:
    return {*layer.lora_A, *getattr(layer, "lora_embedding_A", {})}
