"""The low-rank weights of one module, and which modules can have some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import AdapterError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LowRank:
    """What a module's output gains: ``scaling * (x @ a^T) @ b^T`` (LoRA, arXiv 2106.09685).

    Attributes:
        a: [r, in], any float dtype, as loaded.
        b: [out, r].
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) of rank-stabilised LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def check(self, name: str) -> None:
        """Raises AdapterError if the two matrices of module `name` do not belong together."""
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(
                f"the adapter's lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)} of "
                f"{name} must be [rank, in] and [out, rank] of one rank"
            )
        for letter, tensor in (("A", self.a), ("B", self.b)):
            if tensor.dtype not in _FLOATS:
                raise AdapterError(
                    f"lora_{letter} of {name} has dtype {tensor.dtype}; adapters are floating point"
                )

    def check_finite(self, name: str) -> None:
        """Raises AdapterError naming the tensor that holds NaN or infinity."""
        for letter, tensor in (("A", self.a), ("B", self.b)):
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(
                    f"lora_{letter} of {name} holds NaN or infinity; the adapter's training "
                    "diverged or its file is damaged"
                )


def base_layer(module: torch.nn.Module) -> torch.nn.Module:
    """The module that a PEFT layer wraps, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), torch.nn.Module):
        module = inner
    return module


def features(module: torch.nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, transformers' Conv1D among them; None for any other module."""
    layer = base_layer(module)
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1]
    return None


def check_target(model: Any, name: str, weights: LowRank) -> None:
    """Raises AdapterError if `model` has no such module, or one that `weights` do not fit."""
    kind = type(model).__name__
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"the adapter has weights for {name}, which {kind} does not have; it was made for "
            "another base"
        ) from None
    layer = base_layer(module)
    shape = features(module)
    weight = getattr(layer, "weight", None)
    if shape is None or type(weight) is not torch.nn.Parameter or weight.dtype not in _FLOATS:
        raise AdapterError(
            f"the adapter targets {name}, a {type(layer).__name__}, which is no linear layer with "
            "plain floating-point weights; quantised, sharded and embedding layers cannot be gated"
        )
    wanted = weights.a.shape[1], weights.b.shape[0]
    if shape != wanted:
        raise AdapterError(
            f"the adapter's weights for {name} map {wanted[0]} features to {wanted[1]}, but in "
            f"{kind} it maps {shape[0]} to {shape[1]}; it was made for another base"
        )


def linear_targets(model: Any) -> Iterator[tuple[str, torch.nn.Module, tuple[int, int]]]:
    """Name, module and (in, out) of every linear layer but the output embedding: PEFT's
    "all-linear". Layers that PEFT has put into the model are none."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        shape = features(module)
        inside = any(part.startswith("lora_") or part == "base_layer" for part in name.split("."))
        if shape is not None and not inside and base_layer(module) is not head:
            yield name, module, shape
