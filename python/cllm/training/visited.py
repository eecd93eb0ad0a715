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
from typing import Any

import torch
from torch import Tensor

from .examples import TrainingExample

_FRESH = -1


@dataclass(frozen=True)
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
        guesses = self.inputs(text)[1:]
        right = text[self.start + 1 : self.start + 1 + len(guesses)]
        pairs = enumerate(zip(guesses, right, strict=True))
        return 1 + next((i for i, (a, b) in pairs if a != b), len(guesses))

    def rows(self, text: Sequence[int]) -> range:
        """Rows whose predictions are the next window's guesses; empty if every guess was right."""
        return range(self.kept(text), len(self.inputs(text)))


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
        self._committed = [0, 0]  # tokens, windows, since they were read

    def draw(self, example: TrainingExample, epoch: int, index: int) -> list[Window]:
        """The windows of response `index`. A function of this state, (seed, epoch, index) and the
        response: drawing changes nothing."""
        text = example.prompt + example.response
        if len(example.response) < 2:  # no place for a guess that counts
            return []
        found = []
        stored = zip(self._starts[index].tolist(), self._guesses[index].tolist(), strict=True)
        for number, (start, guesses) in enumerate(stored):
            window = Window(start, guesses[: self.sizes[number] - 1])
            # there is nothing left to guess from the last input on
            if start == _FRESH or start >= len(text) - 2:
                window = self._fresh(example, f"{self.seed},{epoch},{index},{number}", number)
            found.append(window)
        return found

    def advance(
        self, example: TrainingExample, epoch: int, index: int, predictions: Sequence[int]
    ) -> None:
        """Take the windows of `draw` one iteration on.

        Args:
            predictions: of the adapter, for each row (`Window.rows`) of each window in order.
        """
        text = example.prompt + example.response
        rng = random.Random(f"{self.seed},{epoch},{index},fill")
        given = iter(predictions)
        for number, window in enumerate(self.draw(example, epoch, index)):
            rows = window.rows(text)
            guesses = [next(given) for _ in rows]
            guesses += rng.choices(example.prompt, k=self.sizes[number] - 1 - len(guesses))
            self._starts[index, number] = window.start + rows.start
            self._committed[0] += rows.start
            self._committed[1] += 1
            self._guesses[index, number, : len(guesses)] = torch.tensor(guesses, dtype=torch.int32)
        if next(given, None) is not None:
            raise ValueError(f"example {example.id!r}: more predictions than rows")
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

    def _fresh(self, example: TrainingExample, seed: str, number: int) -> Window:
        rng = random.Random(seed)
        text = example.prompt + example.response
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
