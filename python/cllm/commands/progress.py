"""How `cllm collect` shows that it is getting on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.collect.folder import ShardRecord
    from ..training.collect.runner import Watch, Workers

# a prompt is finished when both stages have dealt with it
_STAGES = 2
# seconds between two lines where there is no terminal
_PAUSE = 10.0


class _Meter:
    """Counts what is done and says how fast it goes; draws nothing.

    Time left is what the finished share of this run's work took, scaled to the rest of it.
    """

    def __init__(self, console: Console, workers: Workers) -> None:
        self._console = console
        many = workers.world_size > 1
        self.prefix = f"process {workers.rank} of {workers.world_size}: " if many else ""
        self.steps = self.tokens = self.prompts = 0
        self.shards = self.finished = 0
        self.stage = "responses"
        self.started = time.perf_counter()

    def begin(self, shards: int, finished: int, prompts: int) -> None:
        self.shards, self.finished, self.prompts = shards, finished, prompts
        if finished:
            self._console.print(
                f"{self.prefix}continuing: {finished} of {shards} shards are there", soft_wrap=True
            )
        self.started = time.perf_counter()

    def advance(self, stage: str, prompts: int, tokens: int) -> None:
        self.steps += prompts
        self.tokens += tokens
        self.stage = stage

    def shard(self, record: ShardRecord) -> None:
        self.finished += 1

    @property
    def done(self) -> float:
        """Prompts dealt with; half of one where only its response is there."""
        return self.steps / _STAGES

    def rates(self) -> str:
        """Tokens/s and time left, as far as they can be known."""
        spent = time.perf_counter() - self.started
        parts = []
        if self.tokens:
            parts.append(f"{self.tokens / spent:.0f} tokens/s")
        if self.done and self.done < self.prompts:
            left = spent / self.done * (self.prompts - self.done)
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)


class _Lines(_Meter):
    """A line now and then."""

    def __init__(self, console: Console, workers: Workers) -> None:
        super().__init__(console, workers)
        self._last = time.perf_counter()

    def advance(self, stage: str, prompts: int, tokens: int) -> None:
        super().advance(stage, prompts, tokens)
        if time.perf_counter() - self._last >= _PAUSE:
            self._line()

    def shard(self, record: ShardRecord) -> None:
        super().shard(record)
        if time.perf_counter() - self._last >= _PAUSE or self.finished == self.shards:
            self._line()

    def _line(self) -> None:
        self._last = time.perf_counter()
        rates = self.rates()
        self._console.print(
            f"{self.prefix}{int(self.done)} of {self.prompts} prompts, {self.finished} of "
            f"{self.shards} shards{', ' if rates else ''}{rates}",
            soft_wrap=True,
        )


class _Bar(_Meter):
    """A bar that moves with every batch."""

    def __init__(self, console: Console, workers: Workers, bar: Any) -> None:
        super().__init__(console, workers)
        self._bar = bar
        self._task = bar.add_task(f"{self.prefix}collecting", total=None, text="")

    def begin(self, shards: int, finished: int, prompts: int) -> None:
        super().begin(shards, finished, prompts)
        self._bar.update(self._task, total=prompts, visible=prompts > 0)
        self._show()

    def advance(self, stage: str, prompts: int, tokens: int) -> None:
        super().advance(stage, prompts, tokens)
        self._show()

    def shard(self, record: ShardRecord) -> None:
        super().shard(record)
        self._show()

    def _show(self) -> None:
        count = f"{int(self.done)}/{self.prompts} prompts"
        self._bar.update(
            self._task,
            completed=self.done,
            description=f"{self.prefix}{self.stage}".ljust(len(self.prefix) + len("responses")),
            text=", ".join(filter(None, (count, self.rates()))),
        )


@contextmanager
def watch_for(console: Console, workers: Workers) -> Iterator[Watch]:
    """What suits `console`."""
    if not console.is_terminal:
        yield _Lines(console, workers)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, redirect_stdout=False, transient=True) as bar:
        yield _Bar(console, workers, bar)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
