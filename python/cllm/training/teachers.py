"""Who teaches: the model itself, the model as it was (base), or an average of its weights (ema).

Other teachers run a forward of their own, without gradient and without dropout, over the clean
columns of a packed batch: all that global consistency asks of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..head import LanguageHead, evaluating


class FrozenTeacher:
    """A copy of a model, held outside of it: in no state_dict, and no optimiser finds it.

    Parameters that are frozen in the model are shared with it, not copied.

    Args:
        model: the transformers model to copy as it is now.
        decay: of the moving average that `update` takes; None: the copy stays as it is.
    """

    def __init__(self, model: Any, decay: float | None = None):
        memo = {id(p): p for p in model.parameters() if not p.requires_grad}
        with _bare(model):
            self.model = copy.deepcopy(model, memo).eval().requires_grad_(False)
        self.head = LanguageHead.of(model).of_copy(self.model)
        self.decay = decay
        # the average in fp32: a step of 1 - decay is lost in 16 bits
        self._average: dict[str, Tensor] = {}

    def ready(self, head: LanguageHead) -> AbstractContextManager[LanguageHead]:
        """A context that gives the teacher's head, on the device of the model's."""
        device = head.weight.device
        if self.head.weight.device != device:
            self.model.to(device)
            self._average = {name: value.to(device) for name, value in self._average.items()}
        return nullcontext(self.head)

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """average <- decay * average + (1 - decay) * the model's weights."""
        if self.decay is None:
            return
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value, target = _local(parameter), own[name]
            average = target
            if target.dtype in (torch.float16, torch.bfloat16):
                average = self._average.setdefault(name, target.float())
            average.lerp_(value.to(average), 1 - self.decay)
            if average is not target:
                target.copy_(average)

    def matches(self, model: Any) -> bool:
        """Whether the copy has the model's parameters (an adapter may have been put in since)."""
        names = {name for name, _ in model.named_parameters()}
        return names == {name for name, _ in self.model.named_parameters()}

    def state_dict(self) -> dict[str, Tensor]:
        """What the model's own checkpoint does not hold: the copy, 16-bit averages in fp32."""
        return {**self.model.state_dict(), **self._average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: a state of another model.
        """
        own = self.model.state_dict()
        wrong = sorted(
            name
            for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        )
        if wrong:
            raise ValueError(
                f"this teacher's state belongs to another model: {wrong[0]} "
                f"({len(wrong)} such entries)"
            )
        self.model.load_state_dict(state)
        self._average = {
            name: state[name].to(parameter.device, torch.float32, copy=True)
            for name, parameter in self.model.named_parameters()
            if self.decay is not None and parameter.dtype in (torch.float16, torch.bfloat16)
        }


class AdapterOffTeacher:
    """The base model under a LoRA-like adapter: the model itself with its adapter switched off."""

    def ready(self, head: LanguageHead) -> AbstractContextManager[LanguageHead]:
        """A context that gives the model's head, with the adapter off and no dropout."""
        return adapter_off(head)


Teacher = FrozenTeacher | AdapterOffTeacher


def trains_adapter_only(model: Any) -> bool:
    """Whether a PEFT adapter is in `model` and nothing else of it is trained: then the base model
    is the model with its adapter switched off."""
    adapted = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "_disable_adapters")
        for name, _ in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return bool(adapted) and trained <= adapted


@contextmanager
def adapter_off(head: LanguageHead) -> Iterator[LanguageHead]:
    """The model without its adapters and without dropout, for a while."""
    # not PEFT's enable_adapters, which also sets requires_grad
    layers = [m for m in head.model.modules() if getattr(m, "_disable_adapters", None) is False]
    with evaluating(head.model):
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield head
        finally:
            for layer in layers:
                layer._disable_adapters = False


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """Without the attributes that patches put on this instance, so that a copy has none."""
    patches = {
        name: model.__dict__.pop(name)
        for name in list(model.__dict__)
        if name.startswith("_cllm") or name in ("forward", "generate")
    }
    try:
        yield
    finally:
        model.__dict__.update(patches)


def _local(parameter: Tensor) -> Tensor:
    """A parameter's whole value, FSDP2's shards put together."""
    detached = parameter.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached
