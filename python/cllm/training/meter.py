"""Counts and sums of a training run, kept on the device until they are logged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Counts:
    """What a batch holds, as numbers of the host.

    Attributes:
        rows: rows of the consistency loss that count, the sum of their weights.
        labels: labels of the autoregressive loss.
        noisy: noisy tokens that are forwarded.
        nominal: tokens of the noisy states, the right ones in front included: the unit in which
            the literature counts how much was trained.
        tokens: clean and noisy tokens that are forwarded, padding left out.
    """

    rows: float = 0.0
    labels: float = 0.0
    noisy: float = 0.0
    nominal: float = 0.0
    tokens: float = 0.0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Counts:
        """Of a batch of `ConsistencyCollator`, on the host."""
        labels = (batch["teacher_labels"] >= 0).sum() + (batch["clean_labels"] >= 0).sum()
        return cls(
            rows=float(batch["row_weights"].sum()),
            labels=float(labels),
            noisy=float((batch["segment_ids"] > 0).sum()),
            nominal=float(batch["nominal_tokens"].sum()),
            tokens=float((batch["sample_ids"] >= 0).sum()),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            **{name: value + getattr(other, name) for name, value in asdict(self).items()}
        )

    def numbers(self) -> list[float]:
        """In the order of the fields."""
        return [getattr(self, entry.name) for entry in fields(self)]


class Meter:
    """Losses and speed between two logs, and totals over the run."""

    def __init__(self) -> None:
        self.total = Counts()
        self._since = Counts()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._paused = 0.0
        self._start = time.perf_counter()

    def step(self, counts: Counts) -> None:
        """An optimiser step over batches with these counts, of all processes, begins."""
        self.total += counts
        self._since += counts
        self._steps += 1

    def add(self, **losses: Tensor) -> None:
        """Sum up losses [] of one forward; nothing waits for the device."""
        for name, loss in losses.items():
            loss = loss.detach().float()
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def read(self, accelerator: Any) -> dict[str, float]:
        """What to log since the last call, averaged over the processes; starts the next stretch."""
        if not self._steps:
            return {}
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]) / self._steps
        means = accelerator.reduce(values, "mean").tolist()
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        logs = dict(zip(names, means, strict=True))
        logs["noisy_tokens"] = self.total.nominal
        logs["noisy_tokens_forwarded"] = self.total.noisy
        logs["tokens_per_second"] = self._since.tokens / seconds
        self._since, self._sums, self._steps = Counts(), {}, 0
        self.restart()
        return logs

    def restart(self) -> None:
        """Measure speed from now on."""
        self._paused, self._start = 0.0, time.perf_counter()

    def state(self) -> dict[str, float]:
        """The totals, for a checkpoint."""
        return asdict(self.total)

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from totals that `state` gave."""
        self.total = Counts(**state)
