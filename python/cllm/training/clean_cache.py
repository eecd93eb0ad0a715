"""Clean texts that a gated run has read before: their KV and hidden states, kept over epochs.

Under a gate the clean columns are the frozen base model, so what it makes of a response never
changes and need not be read again in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class _Text:
    """What the base model makes of the C tokens of one text.

    Attributes:
        hidden: [C, H].
        layers: keys and values of every layer, [heads, C, D] each.
    """

    hidden: Tensor
    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + sum(key.nbytes + value.nbytes for key, value in self.layers)

    def cloned(self) -> _Text:
        """In memory of its own, not a view of its batch."""
        pairs = [(key.clone(), value.clone()) for key, value in self.layers]
        return _Text(self.hidden.clone(), pairs)


class CleanCache:
    """Keeps clean texts, first come, until the memory that it may take is full.

    The rows of an epoch come by in another order each time, so what is in it stays: putting the
    oldest out would leave nothing for the next epoch once the texts do not all fit.

    Args:
        limit: bytes.

    Attributes:
        nbytes: that are taken.
        hits, misses: rows that were found, and that were not.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self.hits = self.misses = 0
        self._texts: dict[tuple[bytes, torch.dtype, torch.device], _Text] = {}

    def read(
        self, batch: dict[str, Any], first: int, model: Any, forward: Callable[[Any], Tensor]
    ) -> tuple[Tensor, DynamicCache]:
        """Hidden states [B, first, H] of a batch's clean columns, and their KV cache.

        Args:
            batch: of `ConsistencyCollator`.
            first: how many columns are clean ones or padding of them.
            model: the model that `forward` runs; texts are kept for its dtype and device.
            forward: given an empty cache, fills it and returns [B, first, H].
        """
        tokens, samples = batch["input_ids"][:, :first].cpu(), batch["sample_ids"][:, :first].cpu()
        # a row of several samples has another mixture of them each time
        single = bool((samples <= 0).all())
        lengths = (samples == 0).sum(dim=1).tolist()
        keys = [
            (row[:length].numpy().tobytes(), model.dtype, batch["input_ids"].device)
            for row, length in zip(tokens, lengths, strict=True)
        ]
        if single and all(key in self._texts for key in keys):
            self.hits += len(keys)
            return _assembled([self._texts[key] for key in keys], first)
        self.misses += len(keys)
        cache = DynamicCache()
        hidden = forward(cache)
        if single:
            for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
                self._keep(key, row, length, hidden, cache)
        return hidden, cache

    def _keep(self, key: Any, row: int, length: int, hidden: Tensor, cache: Any) -> None:
        if key in self._texts:
            return
        part = _Text(
            hidden[row, :length],
            [(one.keys[row, :, :length], one.values[row, :, :length]) for one in cache.layers],
        )
        if self.nbytes + part.nbytes <= self.limit:
            self._texts[key] = part.cloned()
            self.nbytes += part.nbytes


def _assembled(texts: list[_Text], width: int) -> tuple[Tensor, DynamicCache]:
    """A batch of texts, filled up with zeros, which nothing attends to."""

    def stacked(parts: list[Tensor], dim: int) -> Tensor:
        shape = list(parts[0].shape)
        shape[dim] = width
        batch = parts[0].new_zeros(len(parts), *shape)
        for row, part in enumerate(parts):
            batch[row].narrow(dim, 0, part.shape[dim]).copy_(part)
        return batch

    cache = DynamicCache()
    for number in range(len(texts[0].layers)):
        pairs = [text.layers[number] for text in texts]
        cache.update(
            stacked([key for key, _ in pairs], 1), stacked([value for _, value in pairs], 1), number
        )
    return stacked([text.hidden for text in texts], 0), cache
