"""The gate of a LoRA adapter in training: it works in the noisy columns of a packed batch, and
every other column is the base model's.

So the clean columns are the frozen base model, which makes them the teacher of the noisy ones at no
cost, and decoding with the same gate (base rows decide, adapted rows propose) gives the base
model's own text whatever the adapter has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..traits import UnsupportedModelError
from .clean_cache import CleanCache

# initialisations that subtract the adapter from the base weights: the base is another model then
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq")


class AdapterGate:
    """Forward hooks on the LoRA layers of one model, shut outside of `hidden_states`.

    While it is there, the adapters add nothing to any forward but a gated one. Gradient
    checkpointing, which computes layers again in the backward pass, finds the gate of its own
    forward there, however many forwards there were in between.

    Args:
        model: a transformers model with LoRA adapters of PEFT in it.

    Attributes:
        two_parts: whether the model gives the same when its clean columns go before the noisy ones
            (`check_gated_forward` finds out).
        texts: what the base model made of clean texts, kept over epochs; None: nothing is kept.

    Raises:
        UnsupportedModelError: if the adapters cannot be gated, or more than adapters is trained.
    """

    def __init__(self, model: Any):
        self.two_parts = False
        self.texts: CleanCache | None = None
        self._model = model
        self._shut: Tensor | None = None  # [B, S, 1] bool: columns that the adapter is kept out of
        self._open = False  # it works in every column
        self._still: list[torch.nn.Module] = []
        self._ran: set[str] = set()
        self._layers = _lora_weights(model)
        self._hooks = [
            layer.register_forward_hook(_GatedOutput(self, name))
            for name, layer in self._layers.items()
        ]

    def remove(self) -> None:
        """Take the hooks off: the adapters work in every column again."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def hidden_states(self, gated: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """What `forward` gives with the adapters in the columns `gated` alone.

        The base model has no dropout in it, since it teaches; the adapters keep theirs.

        Args:
            gated: [B, S] bool.
            forward: a forward over [B, S] tokens; returns hidden states [B, S, H].
        """
        self._check_layers()
        shut = ~gated[..., None]
        with self._entered(shut):
            hidden = forward()
        if hidden.requires_grad:
            # the first gradient that comes back here is before that of any layer
            hidden.register_hook(lambda gradient: self._recall(shut))
        return hidden

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The adapters work in every column of the forwards inside; the base has no dropout."""
        self._check_layers()
        self._enter(None)
        self._open = True
        try:
            yield
        finally:
            self._leave()

    def check_layers_ran(self) -> None:
        """Refuse layers that did not run in the `hidden_states` so far: what they add would not
        go through the gate."""
        for name in self._layers:
            if name not in self._ran:
                raise UnsupportedModelError(
                    f"the adapter {name} does not run as a layer of its own on text, so it cannot "
                    "be gated; leave it out of target_modules"
                )

    def output(self, name: str, output: Tensor) -> Tensor:
        """What the adapter `name` may add, of the output [..., features] of its last matrix."""
        if self._open:
            self._ran.add(name)
            return output
        if self._shut is None:
            return torch.zeros_like(output)
        batch, columns = self._shut.shape[:-1]
        if output.shape[:-1] not in ((batch, columns), (batch * columns,)):
            raise UnsupportedModelError(
                f"the adapter {name} sees {list(output.shape[:-1])} tokens of a batch of "
                f"{[batch, columns]}, so it is not known which are noisy; leave it out "
                "of target_modules"
            )
        self._ran.add(name)
        shut = self._shut if output.dim() == 3 else self._shut.flatten(0, 1)
        return output.masked_fill(shut.to(output.device), 0)

    def _check_layers(self) -> None:
        if _lora_weights(self._model).keys() != self._layers.keys():
            raise ValueError("the adapters have changed since the patch; patch the model again")

    def _recall(self, shut: Tensor) -> None:
        self._enter(shut)
        # DDP and FSDP2 hook onto the end of a backward pass in the same way
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    @contextmanager
    def _entered(self, shut: Tensor) -> Iterator[None]:
        self._enter(shut)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, shut: Tensor | None) -> None:
        self._leave()
        self._shut = shut
        adapters = {
            id(part)
            for module in self._model.modules()
            if isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict)
            for part in module.lora_dropout.modules()
        }
        self._still = [
            module
            for module in self._model.modules()
            if module.training
            and id(module) not in adapters
            # its own flag is what turns checkpointing on
            and not getattr(module, "gradient_checkpointing", False)
        ]
        for module in self._still:
            module.training = False

    def _leave(self) -> None:
        self._shut, self._open = None, False
        for module in self._still:
            module.training = True
        self._still = []


class _GatedOutput:
    """The hook of one layer; an object, so that a deep copy of a model gets a gate of its own."""

    def __init__(self, gate: AdapterGate, name: str):
        self._gate = gate
        self._name = name

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._gate.output(self._name, output)


def _lora_weights(model: Any) -> dict[str, Any]:
    """Name to last matrix (lora_B) of every adapter in `model`, all of which can be gated.

    Raises:
        UnsupportedModelError: otherwise.
    """
    found: dict[str, Any] = {}
    allowed: set[int] = set()
    for prefix, module in model.named_modules():
        if not hasattr(module, "_disable_adapters"):
            continue
        kind = type(module).__name__
        parts = getattr(module, "lora_B", None)
        if not isinstance(parts, torch.nn.ModuleDict) or not len(parts):
            raise UnsupportedModelError(
                f"gated training takes LoRA adapters on linear layers; {prefix} has another "
                f"adapter ({kind})"
            )
        if any(getattr(module, "use_dora", {}).values()) or getattr(module, "lora_variant", {}):
            raise UnsupportedModelError(
                f"{prefix} has DoRA or another variant of LoRA, which changes what the base "
                "weights give and cannot be gated; use plain LoRA (use_dora=False)"
            )
        if getattr(module, "merged_adapters", None):
            raise UnsupportedModelError(
                f"the adapter of {prefix} is merged into the base weights; call "
                "model.unmerge_adapter() first"
            )
        for adapter, last in parts.items():
            first = module.lora_A[adapter]
            if not isinstance(last, torch.nn.Linear) or not isinstance(first, torch.nn.Linear):
                raise UnsupportedModelError(
                    f"gated training takes LoRA adapters on linear layers; that of {prefix} is of "
                    f"{type(last).__name__} layers"
                )
            if getattr(last, "bias", None) is not None:
                raise UnsupportedModelError(
                    f"the adapter of {prefix} has a bias, which the gated adapter's format does "
                    "not hold; use lora_bias=False"
                )
            found[f"{prefix}.lora_B.{adapter}"] = last
            allowed |= {id(first.weight), id(last.weight)}
    if not found:
        raise UnsupportedModelError(
            "gated=True trains LoRA adapters and this model has none; put them on first "
            "(peft.get_peft_model, or lora_r of the trainer)"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in allowed:
            raise UnsupportedModelError(
                f"gated training leaves the base model as it is, but {name} is trained beside the "
                "adapters; freeze it (bias='none', no modules_to_save)"
            )
    for config in (getattr(model, "peft_config", None) or {}).values():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(_REWRITES_BASE):
            raise UnsupportedModelError(
                f"init_lora_weights={start!r} rewrites the base weights; gated training needs "
                "them as they are (init_lora_weights=True)"
            )
    return found
