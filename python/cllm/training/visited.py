"""Windows that walk along responses as gated decoding does: the states that an adapter in training
brings about itself.

A response is known, and so is what decoding would accept of any window over it: the guesses that
are the response's own. So every training step is an iteration of decoding for each window that it
trains on: the adapter's new guesses, which the forward gives anyway, are the window's next state.
No state needs to be collected, and the states improve as the adapter does (the idea of DAgger,
Ross et al. 2011, arXiv 1011.0686: train on the states that the learner itself comes to).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .examples import TrainingExample

_FRESH = -1
# responses whose last draw is kept: more than an optimiser step of one process trains on
_KEPT_DRAWS = 512


@dataclass(frozen=True, slots=True)
class Window:
    """A window of decoding over a text (prompt and response) that is known.

    Attributes:
        start: place in the text of the last committed token, which is the window's first.
        guesses: the tokens behind it, one fewer than the window has.
    """

    start: int
    guesses: list[int]

    def inputs(self, text: Sequence[int]) -> list[int]:
        """The window's tokens that are inputs: the text's last token is nobody's."""
        return [text[self.start], *self.guesses][: len(text) - 1 - self.start]

    def kept(self, text: Sequence[int]) -> int:
        """Tokens that decoding commits: the right guesses in front, and one."""
        return self.rows(text).start

    def rows(self, text: Sequence[int]) -> range:
        """Rows whose predictions are the next window's guesses; empty if every guess was right."""
        tokens, kept = self.inputs(text), 1
        while kept < len(tokens) and tokens[kept] == text[self.start + kept]:
            kept += 1
        return range(kept, len(tokens))


@dataclass(frozen=True)
class _Draw:
    """What `VisitedWindows.draw` gave for a response, and all that it is a function of but the
    seed."""

    example: TrainingExample
    epoch: int
    state: tuple[list[int], list[list[int]]]
    windows: list[Window]


class VisitedWindows:
    """The windows of all responses of a data set, some of each.

    A window that has not been anywhere yet, or that has come to the end of its response, starts
    anew somewhere in it, with a random share of its guesses right and random tokens of the prompt
    for the others.

    Args:
        examples: how many responses.
        windows: of each.
        size: tokens of a window, or several sizes that the windows of a response take in turn.
        seed: of all draws.
    """

    def __init__(self, examples: int, windows: int, size: int | Sequence[int], seed: int = 0):
        given = (size,) if isinstance(size, int) else tuple(size)
        self.sizes = [given[number % len(given)] for number in range(windows)]
        self.seed = seed
        self._starts = torch.full((examples, windows), _FRESH, dtype=torch.int32)
        # those of a smaller window than the largest are filled up with 0
        self._guesses = torch.zeros(examples, windows, max(given) - 1, dtype=torch.int32)
        self._moved: set[int] = set()
        self._draws: dict[int, _Draw] = {}
        self._committed = [0, 0]  # tokens, windows, since they were read

    def draw(self, example: TrainingExample, epoch: int, index: int) -> list[Window]:
        """The windows of response `index`. A function of this state, (seed, epoch, index) and the
        response: drawing changes nothing."""
        if len(example.response) < 2:  # no place for a guess that counts
            return []
        state = starts, guesses = self._starts[index].tolist(), self._guesses[index].tolist()
        # a step draws to train, and once more to advance
        last = self._draws.get(index)
        if last and (last.example, last.epoch, last.state) == (example, epoch, state):
            return last.windows
        text = example.prompt + example.response
        rng = random.Random()
        found = []
        for number, start in enumerate(starts):
            # there is nothing left to guess from the last input on
            if start == _FRESH or start >= len(text) - 2:
                rng.seed(f"{self.seed},{epoch},{index},{number}")
                found.append(self._fresh(example, text, rng, number))
            else:
                found.append(Window(start, guesses[number][: self.sizes[number] - 1]))
        self._draws[index] = _Draw(example, epoch, state, found)
        if len(self._draws) > _KEPT_DRAWS:
            del self._draws[next(iter(self._draws))]
        return found

    def last_drawn(self, index: int) -> TrainingExample | None:
        """The response that `draw` was last given as `index`, while its draw is kept."""
        last = self._draws.get(index)
        return last.example if last else None

    def advance(
        self, example: TrainingExample, epoch: int, index: int, predictions: Sequence[int]
    ) -> None:
        """Take the windows of `draw` one iteration on.

        Args:
            predictions: of the adapter, for each row (`Window.rows`) of each window in order.

        Raises:
            ValueError: more predictions than rows, or fewer.
        """
        text = example.prompt + example.response
        windows = self.draw(example, epoch, index)
        rows = [window.rows(text) for window in windows]
        counted = sum(map(len, rows))
        if len(predictions) != counted:
            what = "more" if len(predictions) > counted else "fewer"
            raise ValueError(f"example {example.id!r}: {what} predictions than rows")
        if not windows:
            return
        rng = random.Random(f"{self.seed},{epoch},{index},fill")
        given = iter(predictions)
        fill = iter(rng.choices(example.prompt, k=sum(self.sizes) - len(self.sizes) - counted))
        width = self._guesses.shape[2]
        guesses = []
        for size, row in zip(self.sizes, rows, strict=True):
            guesses.append([*islice(given, len(row)), *islice(fill, size - 1 - len(row))])
            guesses[-1] += [0] * (width + 1 - size)
        kept = [row.start for row in rows]
        starts = [window.start + count for window, count in zip(windows, kept, strict=True)]
        # one tensor for all windows: making one costs more than all else here
        self._starts[index] = torch.tensor(starts, dtype=torch.int32)
        self._guesses[index] = torch.tensor(guesses, dtype=torch.int32)
        self._committed[0] += sum(kept)
        self._committed[1] += len(kept)
        self._draws.pop(index, None)
        self._moved.add(index)

    def tokens_per_forward(self) -> float | None:
        """Tokens that decoding would have committed per window and iteration, since the last
        call."""
        tokens, windows = self._committed
        self._committed = [0, 0]
        return tokens / windows if windows else None

    def gather(self, accelerator: Any) -> None:
        """Let every process know the windows that the others have moved."""
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            moved = sorted(self._moved)
            mine = (moved, self._starts[moved], self._guesses[moved])
            for indices, starts, guesses in gather_object([mine]):
                self._starts[indices], self._guesses[indices] = starts, guesses
        self._moved.clear()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: starts [E, W] and guesses [E, W, largest size - 1], int32."""
        return {"starts": self._starts, "guesses": self._guesses}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: a state of other data, or of other windows.
        """
        for name, own in self.state().items():
            if name not in state or state[name].shape != own.shape:
                found = list(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"the checkpoint's windows are not those of this data and these settings: "
                    f"{name} is {found}, not {list(own.shape)}"
                )
            own.copy_(state[name])

    def _fresh(
        self, example: TrainingExample, text: list[int], rng: random.Random, number: int
    ) -> Window:
        # one window in each of equal stretches of the response, so that all of it is seen
        first, places = len(example.prompt) - 1, len(example.response) - 1
        stretch = places / self._starts.shape[1]
        start = first + min(places - 1, int((number + rng.random()) * stretch))
        size = self.sizes[number]
        right = text[start + 1 : start + size]
        right += rng.choices(example.prompt, k=size - 1 - len(right))
        share = rng.random()
        guesses = [token if rng.random() < share else rng.choice(example.prompt) for token in right]
        return Window(start, guesses)


class HostCopy:
    """Tensors on their way to the host, while their device and the host both go on."""

    def __init__(self, *tensors: Tensor):
        # a copy from a GPU that does not block goes to pinned memory
        self._copies = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
        streams = [torch.cuda.current_stream(one.device) for one in tensors if one.is_cuda]
        self._events = [stream.record_event() for stream in streams]

    def wait(self) -> list[Tensor]:
        """The copies, once they are there; what was asked of the device later is not waited for."""
        for event in self._events:
            event.synchronize()
        return self._copies
