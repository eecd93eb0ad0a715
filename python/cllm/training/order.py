"""What is trained on when, and with which noisy states: a function of (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .sampling import SampledDataset, SampledExample


class NumberedExamples(SampledDataset):
    """Examples under numbers that carry the epoch: row ``index`` of epoch e is item
    ``e * len(examples) + index``.

    So the sampler alone says what is read: a worker process, a skipped batch or a resumed run
    cannot be in another epoch than the rest.
    """

    def __getitem__(self, number: int) -> SampledExample:
        epoch, index = divmod(number, len(self))
        return self.drawn(index, epoch)


class EpochOrder(Sampler[int]):
    """Numbers of `NumberedExamples` in the order of an epoch.

    Args:
        length: of the data set.
        seed: of the permutations.
        shuffle: False keeps the data set's order.
    """

    def __init__(self, length: int, seed: int, *, shuffle: bool = True):
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self._length
        if not self._shuffle:
            yield from range(first, first + self._length)
            return
        # a generator's seed is one number of 64 bits: 2**20 epochs fit below the run's seed
        generator = torch.Generator().manual_seed((self._seed * 2**20 + self.epoch) % 2**63)
        for index in torch.randperm(self._length, generator=generator).tolist():
            yield first + index
