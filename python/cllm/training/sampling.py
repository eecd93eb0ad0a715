"""Which noisy states of a response are trained on, and the data set that draws them anew in every
epoch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .config import ConsistencyConfig
from .examples import BlockStates, TrainingExample
from .visited import VisitedWindows, Window


@dataclass(frozen=True)
class SampledExample:
    """A response and the states of its blocks that a step trains on.

    Attributes:
        picks: (entry of `example.blocks`, number of the state in it), each pair once.
        tails: for picks that are windows of sliding decoding, n tokens from the last right one on:
            the number of the state of the next entry that the window goes on with, or None if it
            ends with its block. Picks that are not in it end before their block's last token.
        windows: for ``"visited"`` sampling, in place of `picks`.
        number: what the data set calls the row; see `NumberedExamples`.
    """

    example: TrainingExample
    picks: list[tuple[int, int]]
    tails: dict[tuple[int, int], int | None] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    number: int = -1


class StateSampler:
    """Draws states as `ConsistencyConfig.sampling` says.

    What is drawn is a function of (seed, epoch, index) alone, so neither the number of workers or
    processes nor the order of the examples changes it. Never drawn are fixed points and states
    without a counted row: those whose only wrong token is the block's last, which is no input.

    Args:
        config: `sampling`, `states` and `schedule_window` of it are used.
        seed: of all draws.
    """

    def __init__(self, config: ConsistencyConfig, seed: int = 0):
        self.config = config
        self.seed = seed

    def __call__(self, example: TrainingExample, epoch: int, index: int) -> list[tuple[int, int]]:
        """The pairs (block entry, state number) for `example`, in the order of the response.

        Fewer than asked for where there are no more states; none where every guess was right.
        """
        if self.config.sampling == "visited":
            return []  # its windows are no states of the trajectory
        # a string seed is hashed by SHA-512: the same in every process, whatever PYTHONHASHSEED
        rng = random.Random(f"{self.seed},{epoch},{index}")
        if self.config.sampling == "sliding":
            usable = [usable_windows(example, entry) for entry in range(len(example.blocks))]
        else:
            usable = [usable_states(block) for block in example.blocks]
        if self.config.sampling == "uniform":
            every = [(entry, state) for entry, states in enumerate(usable) for state in states]
            return sorted(rng.sample(every, min(self.config.states, len(every))))
        picks = []
        for entry, states in enumerate(usable):
            if self.config.sampling == "schedule":
                target = self._target(example.block_index[entry])
                rng.shuffle(states)  # the sort is stable, so equals stay in random order
                block = example.blocks[entry]
                distance = {state: abs(wrong_share(block, state) - target) for state in states}
                chosen = sorted(states, key=distance.__getitem__)[: self.config.states]
            else:
                chosen = rng.sample(states, min(self.config.states, len(states)))
            picks += [(entry, state) for state in chosen]
        return sorted(picks)

    def tails(
        self, example: TrainingExample, picks: list[tuple[int, int]], epoch: int, index: int
    ) -> dict[tuple[int, int], int | None]:
        """For ``"sliding"``, what each of `picks` goes on with; empty for any other sampling.

        A window's last tokens came into it last, so they have been through no more iterations than
        its first ones: the next block's state is drawn from those up to the same number.
        """
        if self.config.sampling != "sliding":
            return {}
        rng = random.Random(f"{self.seed},{epoch},{index},tails")
        found: dict[tuple[int, int], int | None] = {}
        for entry, state in picks:
            found[entry, state] = None
            following = example.block_index[entry + 1 : entry + 2]
            if following == [example.block_index[entry] + 1]:
                # not its fixed point, if it has any other state
                last = max(0, len(example.blocks[entry + 1].states) - 2)
                found[entry, state] = rng.randint(0, min(state, last))
        return found

    def _target(self, block: int) -> float:
        """Share of wrong tokens wanted in this block of a response: 0 at the start of a window, 1
        at its end (arXiv 2512.14681)."""
        window = self.config.schedule_window
        return 1.0 if window == 1 else block % window / (window - 1)


def usable_states(block: BlockStates) -> list[int]:
    """Numbers of the states that have a row to train on: some input is wrong."""
    last = len(block.fixed_point) - 1
    return [number for number, first in enumerate(block.first_divergence) if first < last]


def usable_windows(example: TrainingExample, entry: int) -> list[int]:
    """The same for windows that go on behind their block: only the response's last token is no
    input."""
    start, block = example.block_start(entry), example.blocks[entry]
    end = min(start + len(block.fixed_point), len(example.response) - 1)
    return [number for number, first in enumerate(block.first_divergence) if start + first < end]


def wrong_share(block: BlockStates, state: int) -> float:
    """Share of a state's tokens that differ from the fixed point."""
    pairs = list(zip(block.states[state], block.fixed_point, strict=True))
    return sum(guess != token for guess, token in pairs) / len(pairs)


def ended(example: TrainingExample, end_tokens: Iterable[int]) -> TrainingExample:
    """`example` without whatever stands behind the first end-of-text token of its response."""
    response = example.response
    length = min(
        (response.index(token) + 1 for token in end_tokens if token in response),
        default=len(response),
    )
    if length == len(example.response):
        return example
    blocks, block_index = [], []
    for entry, block in enumerate(example.blocks):
        keep = length - example.block_start(entry)
        if keep > 0:
            blocks.append(BlockStates([state[:keep] for state in block.states]))
            block_index.append(example.block_index[entry])
    return replace(
        example, response=example.response[:length], blocks=blocks, block_index=block_index
    )


class SampledDataset(Dataset):
    """Examples with states drawn for the current epoch: what a `DataLoader` reads.

    The epoch lives in shared memory, so `set_epoch` reaches workers that are already running.

    Args:
        examples: a sequence, or map-style data set, of `TrainingExample`.
        config, seed: of `StateSampler`.
        end_tokens: end-of-text tokens; nothing behind the first one in a response counts.

    Attributes:
        windows: for ``"visited"`` sampling, where all windows are; else None.
    """

    def __init__(
        self,
        examples: Sequence[TrainingExample] | Any,
        config: ConsistencyConfig,
        seed: int = 0,
        end_tokens: Iterable[int] = (),
    ):
        self.examples = examples
        self.sampler = StateSampler(config, seed)
        self.end_tokens = tuple(end_tokens)
        self.windows: VisitedWindows | None = None
        if config.sampling == "visited" and len(examples):
            size = config.window_size or examples[0].block_size
            self.windows = VisitedWindows(len(examples), config.states, size, seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other states from now on (accelerate's and torch's habit)."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SampledExample:
        return self.drawn(index, self.epoch)

    def drawn(self, index: int, epoch: int) -> SampledExample:
        """Row `index` with the states of `epoch`."""
        example = self._example(index)
        picks = self.sampler(example, epoch, index)
        tails = self.sampler.tails(example, picks, epoch, index)
        windows = [] if self.windows is None else self.windows.draw(example, epoch, index)
        return SampledExample(example, picks, tails, windows, epoch * len(self) + index)

    def advance(self, numbers: Tensor, predictions: Tensor) -> None:
        """Take the ``"visited"`` windows of a batch one iteration of decoding on.

        Args:
            numbers: [B, R] int64, of the batch (`ConsistencyCollator`): whose row each is, -1 none.
            predictions: [B, R] int64: what the adapter guesses in these rows.
        """
        if self.windows is None:
            raise ValueError("only sampling='visited' has windows to advance")
        numbers, predictions = numbers.flatten().cpu(), predictions.flatten().cpu()
        counted = (numbers >= 0).nonzero()[:, 0]
        # stable: a response's rows stay in the order of its windows
        numbers, order = numbers[counted].sort(stable=True)
        found, rows = numbers.unique_consecutive(return_counts=True)
        parts = predictions[counted[order]].split(rows.tolist())
        for number, part in zip(found.tolist(), parts, strict=True):
            epoch, index = divmod(number, len(self))
            # reading a row once more may mean to decode a part of a file
            example = self.windows.last_drawn(index) or self._example(index)
            self.windows.advance(example, epoch, index, part.tolist())

    def _example(self, index: int) -> TrainingExample:
        return ended(self.examples[index], self.end_tokens)
