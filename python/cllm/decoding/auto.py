"""``block_size="auto"``: the window with the most tokens per second, call by call.

Tokens per second are tokens per forward over seconds per forward. The second factor is the
machine's: it is measured once for a model, device and batch size, at a few widths. The first is the
text's: every call adds to what is known of how often guesses are right, and of which source, and
the next call goes by it. A call keeps the window that it starts with, so that its bits do not
depend on the clock half way.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..adapter import GatedAdapter
from .automatic import obstacle
from .config import Compile, JacobiConfig
from .forward_clock import ForwardClock
from .odds import GuessOdds

# block sizes that are tried, and of windows that stand twice (verify size = block size)
PLAIN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GATED = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# a width is not worth timing any more where a forward takes so many times one of a single row
_DEAREST = 3.0
_ROUNDS = 3
# what is believed before anything is seen, and how many guesses that is worth
_PRIOR, _PRIOR_WEIGHT = 0.5, 4.0
# most guesses that are remembered of a place: texts change
_MEMORY = 128.0
# where nothing is guessed nothing is learnt, so what is known is worth less call by call
_FADE = 0.9

Runs = Counter[tuple[int, bool]]


class Acceptance:
    """How often the guess in each place of a window is right, if all before it are.

    A forward that commits k tokens of a window of n has k - 1 right guesses and, unless k = n or
    the text ends there, a wrong one behind them: observations that are cut off on the right, of
    which each place's rate is estimated by itself (Kaplan and Meier 1958), so that calls with
    different windows add up. Places that no window reached are taken to be as those before them.

    Attributes:
        odds: `GuessOdds.learnt` of the latest call that weighed its sources; None: none has.
    """

    odds: torch.Tensor | None = None

    def __init__(self) -> None:
        self._right: list[float] = []
        self._tried: list[float] = []

    def add(self, runs: Runs, size: int) -> None:
        """What forwards over windows of `size` tokens committed.

        Args:
            runs: (tokens, the text ended there) to how often; a row's every iteration counts.
        """
        if size == 1:
            self._scale(_FADE)
            return
        while len(self._tried) < size - 1:
            self._right.append(0.0)
            self._tried.append(0.0)
        for (tokens, ended), times in runs.items():
            for place in range(min(tokens, size) - 1):
                self._right[place] += times
                self._tried[place] += times
            if 0 < tokens < size and not ended:
                self._tried[tokens - 1] += times
        if self._tried[0] > _MEMORY:
            self._scale(_MEMORY / self._tried[0])

    def tokens_per_forward(self, size: int) -> float:
        """Expected of a window of `size` tokens."""
        total = alive = 1.0
        rate = _PRIOR
        for place in range(size - 1):
            if place < len(self._tried):
                right, tried = self._right[place], self._tried[place]
                rate = (right + _PRIOR_WEIGHT * rate) / (tried + _PRIOR_WEIGHT)
            alive *= rate
            total += alive
        return total

    def _scale(self, factor: float) -> None:
        self._right = [value * factor for value in self._right]
        self._tried = [value * factor for value in self._tried]


@dataclass
class _Known:
    """What is known of one model.

    Attributes:
        seconds: (device, dtype, batch bucket, captured, adapter or None) to seconds of a forward by
            size: launched kernel by kernel, all widths take what their launches take.
        acceptance: (what guesses, greedy or sampled) to how often it is right.
    """

    seconds: dict[tuple, dict[int, float]] = field(default_factory=dict)
    acceptance: dict[tuple, Acceptance] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Choice:
    """A call's window.

    Attributes:
        settings: with numbers in the place of ``"auto"``.
        gated: whether the adapter makes the guesses; otherwise nobody asks it.
    """

    settings: JacobiConfig
    gated: bool
    _acceptance: Acceptance

    @property
    def odds(self) -> torch.Tensor | None:
        """What calls like this one have learnt of their sources (`GuessOdds`); None: nothing."""
        return self._acceptance.odds

    def observe(self, runs: Runs, odds: GuessOdds | None) -> None:
        """Learn from what the call's forwards committed, and from what its sources proposed: what
        came of the last proposals is counted only where a graph ran one iteration ahead."""
        self._acceptance.add(runs, self.settings.width)
        if odds is not None and runs:
            self._acceptance.odds = odds.learnt()


def choose(
    model: Any,
    settings: JacobiConfig,
    adapter: GatedAdapter | None,
    *,
    prompt: Sequence[int],
    batch: int,
    new_tokens: int,
    sampled: bool,
    context: int | None,
) -> Choice:
    """The window for a call.

    Args:
        settings: with ``block_size="auto"``.
        adapter: may make the guesses, where that is faster than doing without it.
        prompt: token ids [P], to time forwards behind where the machine is not known yet.
        batch: B.
        new_tokens: length limit of the text, and of the window.
        sampled: guesses of samples are right less often, so they are counted apart.
        context: most positions of the model, or None.
    """
    known = _known.setdefault(model, _Known())
    guesser = (
        settings.longest_lookup,
        settings.lookup_least,
        settings.pool,
        settings.guesses,
        settings.fill,
        sampled,
    )
    guessers = (None,) if adapter is None else (None, adapter)
    costs = _seconds(known, model, guessers, prompt, batch, context, settings)
    options = []
    for who, seconds in zip(guessers, costs, strict=True):
        acceptance = known.acceptance.setdefault((_name(who), *guesser), Acceptance())
        for size, cost in seconds.items():
            if size <= max(1, new_tokens):
                rate = acceptance.tokens_per_forward(size) / cost
                options.append((rate, -size, who is not None, acceptance))
    # of equals the narrowest
    _, size, gated, acceptance = max(options, key=lambda one: one[:2])
    chosen = replace(settings, block_size=-size, verify_size=-size if gated else None)
    return Choice(chosen, gated, acceptance)


def _name(adapter: GatedAdapter | None) -> tuple | None:
    return None if adapter is None else (adapter.parameters, adapter.ranks)


def _seconds(
    known: _Known,
    model: Any,
    guessers: Sequence[GatedAdapter | None],
    prompt: Sequence[int],
    batch: int,
    context: int | None,
    settings: JacobiConfig,
) -> list[dict[int, float]]:
    """Of each of `guessers`, seconds of a forward by size. Where one of them is new all are timed,
    in turn: they stand against each other, and a machine is not as fast at one time as at another.
    """
    device = model.get_input_embeddings().weight.device
    bucket = (batch - 1).bit_length()
    compile = _coming(model, device, settings)
    keys = [
        (str(device), model.dtype, bucket, compile != "off", _name(adapter)) for adapter in guessers
    ]
    if any(key not in known.seconds for key in keys):
        ladders = []
        for adapter in guessers:
            every = PLAIN if adapter is None else GATED
            sizes = [size for size in every if context is None or size <= context]
            clock = ForwardClock(
                model, prompt, 2 * sizes[-1], adapter, batch=1 << bucket, compile=compile
            )
            ladders.append((partial(_forward, clock, adapter is not None), sizes))
        known.seconds.update(zip(keys, timed(*ladders), strict=True))
    return [known.seconds[key] for key in keys]


def _forward(clock: ForwardClock, gated: bool, size: int) -> float:
    return clock.gated(size, size, 1) if gated else clock.plain(size, 1)


def _coming(model: Any, device: Any, settings: JacobiConfig) -> Compile | None:
    """`compile` of calls like the coming one: what they are without a graph, if they get none. The
    first call of a shape, which gets none yet, goes by the seconds of those behind it, or it would
    be another shape."""
    if settings.compile is not None:
        return settings.compile
    alone = settings.record_trajectories or obstacle(model, device) is not None
    return "off" if alone else None


def timed(
    *ladders: tuple[Callable[[int], float], Iterable[int]],
) -> list[dict[int, float]]:
    """Seconds of forwards by their size, the best of a few: warming up and what else runs only ever
    add.

    Args:
        ladders: what times a forward, and sizes, ascending; no more are tried behind one that is
            too dear to pay, beside the first of all.

    Returns:
        One for each ladder.
    """
    every: list[dict[int, float]] = []
    for run, sizes in ladders:
        found: dict[int, float] = {}
        every.append(found)
        for size in sizes:
            found[size] = run(size)
            if found[size] > _DEAREST * next(iter(every[0].values())):
                break
    for _ in range(_ROUNDS - 1):  # all in turn
        for (run, _), found in zip(ladders, every, strict=True):
            for size in found:
                found[size] = min(found[size], run(size))
    return every
