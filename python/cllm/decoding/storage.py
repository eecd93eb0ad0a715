"""The layers' storage in few tensors, so that one operation moves tokens in all of them."""

from __future__ import annotations

from typing import Any

import torch


class Storage:
    """Hands out parts of tensors [layers, B, capacity, heads, D], one for keys and one for values.

    Attributes:
        whole: that everything handed out is a part of; None: something is a tensor of its own.

    Args:
        layers: that will ask for storage. One that comes beyond them, or wants another shape, dtype
            or device than the first, gets a tensor of its own.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._stacks: dict[str, torch.Tensor] = {}
        self._used: dict[str, int] = {}
        self._alone = False

    @property
    def whole(self) -> list[torch.Tensor] | None:
        return None if self._alone else list(self._stacks.values())

    def take(self, kind: str, states: torch.Tensor, capacity: int) -> torch.Tensor:
        """Zeros [B, capacity, heads, D] like `states` [B, heads, n, D]; `kind`: keys or values."""
        batch, heads, _, size = states.shape
        shape = batch, capacity, heads, size
        if kind not in self._stacks:
            self._stacks[kind] = states.new_zeros(self._layers, *shape)
            self._used[kind] = 0
        stack, place = self._stacks[kind], self._used[kind]
        like = (shape, states.dtype, states.device)
        if place == self._layers or (stack.shape[1:], stack.dtype, stack.device) != like:
            self._alone = True
            return states.new_zeros(shape)
        self._used[kind] = place + 1
        return stack[place]


def storage_for(model: Any) -> Storage | None:
    """For the layers of `model` that have keys and values of their own, by its configuration; None
    where that does not tell, or where layers are on several devices."""
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or len({one.device for one in model.parameters()}) > 1:
        return None
    return Storage(layers - (getattr(config, "num_kv_shared_layers", None) or 0))


def moved(storage: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the tokens of slots `source` [B, m] to slots `target` [B, m].

    Args:
        storage: [B, capacity, heads, D], or such of many layers, [layers, B, capacity, heads, D].
    """
    source, target = source.to(storage.device), target.to(storage.device)
    rows = torch.arange(source.shape[0], device=storage.device)[:, None]
    if storage.dim() == 4:
        storage[rows, target] = storage[rows, source]
    else:
        storage[:, rows, target] = storage[:, rows, source]
