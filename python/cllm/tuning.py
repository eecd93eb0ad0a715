"""Which window decodes a model fastest on this machine: `tune`.

Tokens per second are tokens per forward times forwards per second. The first factor depends on the
window, the model and the text, and on no clock; the second on the rows of a forward and on the
machine. So each is measured once, apart: the windows' tokens per forward by decoding the prompts,
the seconds of a forward at every width in turn, a few forwards at a time, so that a machine that
slows down slows all of them down. The best products are then measured again whole, beside
HuggingFace's greedy search, prompt by prompt in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import resolve_adapter
from .decoding import JacobiConfig, JacobiOutput, generate
from .decoding.forward_clock import ForwardClock
from .decoding.graphs import has_graphs
from .evaluation import encode_prompts
from .head import evaluating
from .patching import original_generate
from .prompts import Prompt
from .responders import end_tokens, left_padded
from .spread import Spread

SIZES = (1, 2, 4, 8, 16, 32)
# a window of v verify rows commits v tokens at most, so v = 1 cannot win
PAIRS = ((2, 2), (2, 4), (2, 8), (3, 6), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16))

# stage, steps that are done, steps in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Window:
    """What is tuned: `block_size` and, of gated decoding, `verify_size` (see `JacobiConfig`).

    Attributes:
        verify_size: None: plain decoding, no adapter.
    """

    block_size: int
    verify_size: int | None = None

    @property
    def gated(self) -> bool:
        return self.verify_size is not None

    @property
    def rows(self) -> int:
        """Of every forward."""
        return self.block_size + (self.verify_size or 0)

    @property
    def config(self) -> JacobiConfig:
        return JacobiConfig(block_size=self.block_size, verify_size=self.verify_size)

    def __str__(self) -> str:
        plain = f"n = {self.block_size}"
        return plain if self.verify_size is None else f"{plain}, v = {self.verify_size}"


ONE = Window(1)


@dataclass(frozen=True)
class Candidate:
    """A window's two factors.

    Attributes:
        tokens_per_forward: over all prompts, every forward counted but the prefill.
        seconds_per_forward: behind the prompt of median length.
    """

    window: Window
    tokens_per_forward: float
    seconds_per_forward: Spread

    @property
    def tokens_per_second(self) -> float:
        """What the factors promise, the prefill apart."""
        return self.tokens_per_forward / self.seconds_per_forward.median


@dataclass(frozen=True)
class Measured:
    """A contender, whole: prefill, adapter and all.

    Attributes:
        window: None: HuggingFace's greedy search.
        tokens_per_second: over prompts and rounds.
        ratio: of its tokens per second to HuggingFace's for the same prompt in the same round.
    """

    window: Window | None
    tokens_per_second: Spread
    ratio: Spread


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        candidates: every window, in the order given.
        measured: HuggingFace's greedy search, then the finalists, the most promising first.
        prompts: how many.
        max_new_tokens: length limit of a text.
    """

    candidates: tuple[Candidate, ...]
    measured: tuple[Measured, ...]
    prompts: int
    max_new_tokens: int

    @property
    def best(self) -> Window | None:
        """The fastest window as measured; None where neither HuggingFace's greedy search nor
        ``n = 1`` is beaten, and patching the model gains nothing."""
        first = max(self.measured, key=lambda one: one.ratio.median).window
        return None if first == ONE else first

    def fastest(self, *, gated: bool) -> Window:
        """The fastest window of more than one row, with an adapter or without.

        Raises:
            ValueError: none of that kind was tried.
        """
        kept = [one for one in self.measured if one.window and one.window != ONE]
        kept = [one for one in kept if one.window is not None and one.window.gated == gated]
        if not kept:
            raise ValueError(f"no window {'with an adapter' if gated else 'without one'} was tried")
        window = max(kept, key=lambda one: one.ratio.median).window
        assert window is not None
        return window

    def line(self, adapter: str = "adapter") -> str | None:
        """The call that sets the model up this way; None where there is nothing to gain.

        Args:
            adapter: Python source of the adapter.
        """
        best = self.best
        if best is None:
            return None
        sizes = f"block_size={best.block_size}"
        if best.verify_size is None:
            return f"cllm.patch(model, cllm.JacobiConfig({sizes}))"
        sizes += f", verify_size={best.verify_size}"
        return f"cllm.patch(model, cllm.JacobiConfig({sizes}), adapter={adapter})"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "prompts": self.prompts,
            "max_new_tokens": self.max_new_tokens,
            "candidates": [
                {
                    **asdict(one.window),
                    "rows": one.window.rows,
                    "tokens_per_forward": one.tokens_per_forward,
                    "seconds_per_forward": asdict(one.seconds_per_forward),
                    "tokens_per_second": one.tokens_per_second,
                }
                for one in self.candidates
            ],
            "measured": [
                {
                    "window": None if one.window is None else asdict(one.window),
                    "tokens_per_second": asdict(one.tokens_per_second),
                    "ratio_to_huggingface": asdict(one.ratio),
                }
                for one in self.measured
            ],
            "best": None if self.best is None else asdict(self.best),
        }


@torch.no_grad()
def tune(
    model: Any,
    prompts: Sequence[Prompt | str | Sequence[int] | Tensor],
    adapter: Any = None,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    sizes: Iterable[int] = SIZES,
    pairs: Iterable[tuple[int, int]] = PAIRS,
    batch_size: int = 4,
    rounds: int = 5,
    forwards: int = 4,
    finalists: int = 2,
    repeats: int = 2,
    progress: Progress | None = None,
) -> Tuning:
    """Find the `block_size` (and `verify_size`) that decodes a model fastest on this machine.

    Args:
        model: a causal language model, patched or not; it is put in evaluation mode and back.
        prompts: like those the model will get; `Prompt`, text, or token ids [P].
        adapter: what `generate` takes: pairs are tried beside the plain windows.
        tokenizer: needed where prompts are text.
        max_new_tokens: length limit of a text.
        sizes: `block_size` of the plain windows; 1 is always among them.
        pairs: (`verify_size`, `block_size`) of the gated ones.
        batch_size: prompts that are decoded together where forwards are counted, not timed.
        rounds, forwards: each width is timed in so many turns of so many forwards, after one that
            is not counted.
        finalists: so many of the best windows are measured whole, besides the best of each kind
            and ``n = 1``; `repeats` times with every prompt.
        progress: is told of every step.

    Raises:
        ValueError: no prompts, text without a tokenizer, a size below 1, `verify_size` beyond
            `block_size`, an adapter of another base (`AdapterError`), a count below 1.
        UnsupportedModelError: the model cannot be decoded this way.
    """
    counts = dict(
        max_new_tokens=max_new_tokens, batch_size=batch_size, rounds=rounds, forwards=forwards,
        finalists=finalists, repeats=repeats,
    )  # fmt: skip
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    if tokenizer is None and any(isinstance(prompt, (str, Prompt)) for prompt in prompts):
        raise ValueError("prompts that are text need the tokenizer; pass tokenizer=tokenizer")
    ids = encode_prompts(model, tokenizer, prompts)
    windows = _windows(sizes, pairs if adapter is not None else ())
    if adapter is not None:
        adapter = resolve_adapter(adapter)
        adapter.check(model)
    tell = progress or (lambda *_: None)
    with evaluating(model):
        decoder = _Decoder(model, adapter, max_new_tokens)
        middle = sorted(ids, key=len)[len(ids) // 2]
        room = max_new_tokens + max(window.rows for window in windows)
        clock = ForwardClock(model, middle, room, adapter, compile=None)
        seconds = _forward_seconds(clock, windows, rounds, forwards, tell)
        del clock  # its caches
        candidates = []
        for number, window in enumerate(windows):
            tell("counting tokens per forward", number, len(windows))
            rate = 1.0 if window == ONE else decoder.tokens_per_forward(ids, window, batch_size)
            candidates.append(Candidate(window, rate, seconds[window.rows, window.gated]))
        tell("counting tokens per forward", len(windows), len(windows))
        chosen = _finalists(candidates, finalists)
        measured = _measured(decoder, ids, chosen, repeats, tell)
    return Tuning(tuple(candidates), measured, len(ids), max_new_tokens)


def _windows(sizes: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[Window]:
    windows = [ONE, *(Window(size) for size in sizes), *(Window(n, v) for v, n in pairs)]
    for window in windows:
        _ = window.config  # refuses bad sizes
    return list(dict.fromkeys(windows))


def _finalists(candidates: Sequence[Candidate], count: int) -> list[Window]:
    ranked = sorted(candidates, key=lambda one: -one.tokens_per_second)
    windows = [one.window for one in ranked if one.window != ONE]
    kinds = [[w for w in windows if w.gated == gated][:1] for gated in (False, True)]
    chosen = {*windows[:count], *kinds[0], *kinds[1]}
    return [*(window for window in windows if window in chosen), ONE]


class _Decoder:
    """Calls of one model with one adapter and one length limit."""

    def __init__(self, model: Any, adapter: Any, max_new_tokens: int) -> None:
        self._model = model
        self._adapter = adapter
        self._max_new_tokens = max_new_tokens
        pad = model.generation_config.pad_token_id
        self._pad = pad if pad is not None else min(end_tokens(model), default=0)

    def _inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids, mask = left_padded(rows, self._pad)
        device = self._model.get_input_embeddings().weight.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "max_new_tokens": self._max_new_tokens,
            "pad_token_id": self._pad,
            "do_sample": False,
            "num_beams": 1,
        }

    def _run(self, rows: Sequence[Sequence[int]], window: Window, **more: Any) -> JacobiOutput:
        out = generate(
            self._model,
            config=window.config,
            adapter=self._adapter if window.gated else None,
            return_dict_in_generate=True,
            **(self._inputs(rows) | more),
        )
        assert isinstance(out, JacobiOutput)
        return out

    def tokens_per_forward(
        self, prompts: Sequence[Sequence[int]], window: Window, batch_size: int
    ) -> float:
        """Over all prompts; rows of a batch count the forwards that they take part in."""
        tokens = forwards = 0
        order = sorted(prompts, key=len)
        for start in range(0, len(order), batch_size):
            out = self._run(order[start : start + batch_size], window)
            assert out.accepted is not None and out.iterations is not None
            tokens += int(out.accepted.sum())
            forwards += int(out.iterations.sum())
        return tokens / forwards

    def warm_up(self, prompts: Sequence[Sequence[int]], window: Window | None) -> None:
        """What the first calls alone pay for: the second of a shape that a prompt has may come to
        capture a graph. Texts of full length, cut short, have that shape."""
        if window is None:
            limit = {"max_new_tokens": min(4, self._max_new_tokens)}
            original_generate(self._model)(**(self._inputs(prompts[:1]) | limit))
        elif has_graphs(self._model.get_input_embeddings().weight.device):
            for prompt in (prompt for prompt in prompts for _ in range(2)):
                self._run([prompt], window, max_iterations=2)
        else:
            self._run(prompts[:1], window, max_iterations=2)

    def tokens_per_second(self, prompt: Sequence[int], window: Window | None) -> float:
        """Of a whole call; None: of HuggingFace's greedy search."""
        started = time.perf_counter()
        if window is None:
            sequences = original_generate(self._model)(**self._inputs([prompt]))
        else:
            sequences = self._run([prompt], window).sequences
        sequences = sequences.cpu()  # a GPU may still be at it
        return (sequences.shape[1] - len(prompt)) / (time.perf_counter() - started)


def _forward_seconds(
    clock: ForwardClock, windows: Sequence[Window], rounds: int, forwards: int, tell: Progress
) -> dict[tuple[int, bool], Spread]:
    """Of a forward by its rows and whether it is gated."""
    # with the most guess rows that a gated width has: they are what the adapter is computed for
    shapes = {
        (window.rows, window.gated): window
        for window in sorted(windows, key=lambda window: window.block_size)
    }
    seconds: dict[tuple[int, bool], list[float]] = {shape: [] for shape in shapes}
    for number in range(rounds + 1):
        for step, (shape, window) in enumerate(shapes.items()):
            tell("timing a forward", number * len(shapes) + step, (rounds + 1) * len(shapes))
            many = forwards if number else 1  # the first turn warms up
            if window.verify_size is None:
                found = clock.plain(window.block_size, many)
            else:
                found = clock.gated(window.verify_size, window.block_size, many)
            if number:
                seconds[shape].append(found)
    tell("timing a forward", (rounds + 1) * len(shapes), (rounds + 1) * len(shapes))
    return {shape: Spread.of(values) for shape, values in seconds.items()}


def _measured(
    decoder: _Decoder,
    prompts: Sequence[Sequence[int]],
    windows: Sequence[Window],
    repeats: int,
    tell: Progress,
) -> tuple[Measured, ...]:
    contenders = [None, *windows]
    rates: dict[Window | None, list[float]] = {contender: [] for contender in contenders}
    for contender in contenders:
        decoder.warm_up(prompts, contender)
    turns = [prompt for _ in range(repeats) for prompt in prompts]
    for number, prompt in enumerate(turns):
        tell("measuring the best", number, len(turns))
        first = number % len(contenders)  # takes turns too
        for contender in contenders[first:] + contenders[:first]:
            rates[contender].append(decoder.tokens_per_second(prompt, contender))
    tell("measuring the best", len(turns), len(turns))
    theirs = rates[None]
    return tuple(
        Measured(
            contender,
            Spread.of(rates[contender]),
            Spread.of([a / b for a, b in zip(rates[contender], theirs, strict=True)]),
        )
        for contender in contenders
    )
