"""One-token decoding and Jacobi decoding of the same prompt, timed the same way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from ..decoding import JacobiConfig, JacobiOutput
from ..decoding import generate as jacobi_generate
from ..prompts import Prompt
from ..trajectory import Trajectory
from ..verification import verify

if TYPE_CHECKING:
    from ..adapter import GatedAdapter
    from ..models import LoadedModel

Side = Literal["autoregressive", "jacobi"]
SIDES: tuple[Side, Side] = ("autoregressive", "jacobi")


class View(Protocol):
    """Watches a run. Its time is taken off both clocks, so it may draw at leisure."""

    def prompt(self, number: int, total: int, prompt: Prompt) -> None:
        """Prompt `number` (from 1) of `total` begins."""

    def tokens(self, side: Side, ids: list[int], new: int, steps: int, seconds: float) -> None:
        """`side` has generated `ids` after `steps` forwards; the last `new` came in at once."""

    def finished(self, result: PromptResult) -> None:
        """Both sides of a prompt are done."""


@dataclass(frozen=True)
class SideResult:
    """What one side did with one prompt.

    Attributes:
        ids: generated token ids, the prompt not among them.
        forwards: forward passes that gave tokens: the Jacobi side's prefill gives none.
        seconds: wall clock of the whole call, prefill included, drawing excluded.
    """

    ids: list[int]
    forwards: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds


@dataclass(frozen=True)
class Difference:
    """Where the two sides part.

    Attributes:
        index: of the first token that differs, in the generated text.
        autoregressive, jacobi: the two tokens as text; empty where that side had ended.
        autoregressive_gap, jacobi_gap: how far each token's logit lies below the largest one in a
            full forward over its sequence; None where that side had ended.
    """

    index: int
    autoregressive: str
    jacobi: str
    autoregressive_gap: float | None
    jacobi_gap: float | None


@dataclass(frozen=True)
class PromptResult:
    """Both sides of one prompt.

    Attributes:
        trajectory: of the Jacobi side, with the adapter where one is in use.
        plain: of Jacobi decoding without the adapter, where that was asked for.
    """

    prompt: Prompt
    prompt_tokens: int
    text: str
    autoregressive: SideResult
    jacobi: SideResult
    trajectory: Trajectory
    difference: Difference | None
    verification: str | None = None
    near_ties: list[tuple[int, float]] = field(default_factory=list)
    plain: Trajectory | None = None

    @property
    def identical(self) -> bool:
        return self.difference is None

    @property
    def tokens_per_forward(self) -> float:
        return len(self.jacobi.ids) / max(self.jacobi.forwards, 1)

    @property
    def speedup(self) -> float:
        return self.jacobi.tokens_per_second / self.autoregressive.tokens_per_second


class _Clock:
    """A HuggingFace streamer that shows tokens to a view and keeps the drawing off the time."""

    def __init__(self, side: Side, view: View | None) -> None:
        self._side: Side = side
        self._view = view
        self._ids: list[int] = []
        self._puts = -1
        self._drawing = 0.0
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt [1, P] once, then with each run of new tokens, [k]."""
        entered = time.perf_counter()
        self._puts += 1
        if self._puts and self._view is not None:
            new = value.flatten().tolist()
            self._ids.extend(new)
            seconds = entered - self._start - self._drawing
            self._view.tokens(self._side, self._ids, len(new), self._puts, seconds)
        self._drawing += time.perf_counter() - entered

    def end(self) -> None:
        """Part of the streamer protocol; `seconds` reads the clock."""

    def seconds(self) -> float:
        """Since construction, without the view's share."""
        return time.perf_counter() - self._start - self._drawing


class Measurement:
    """Decodes prompts both ways, on one model with one set of options.

    Args:
        loaded: the model.
        config: of the Jacobi side; trajectories are recorded whatever it says.
        max_new_tokens: limit for both sides.
        view: is shown both sides as they run.
        adapter: makes the guesses of the Jacobi side; the one-token side is the base model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: JacobiConfig,
        max_new_tokens: int,
        view: View | None = None,
        adapter: GatedAdapter | None = None,
    ) -> None:
        self._adapter = adapter
        self._loaded = loaded
        self._config = config.updated(record_trajectories=True)
        self._max_new_tokens = max_new_tokens
        self._view = view
        self._device = next(loaded.model.parameters()).device

    def warm_up(self, ids: torch.Tensor) -> None:
        """Run both sides for a few tokens untimed: allocator, thread pools, compiled kernels."""
        for side in SIDES:
            self._decode(side, ids, min(4, self._max_new_tokens), None)

    def run(self, prompts: list[tuple[Prompt, torch.Tensor]]) -> list[PromptResult]:
        """Measure every (prompt, token ids [P]), the sides taking turns at going first."""
        results = []
        for index, (prompt, ids) in enumerate(prompts):
            if self._view is not None:
                self._view.prompt(index + 1, len(prompts), prompt)
            order = SIDES if index % 2 == 0 else SIDES[::-1]
            sides: dict[Side, SideResult] = {}
            trajectory: Trajectory | None = None
            for side in order:
                sides[side], recorded = self._decode(side, ids, self._max_new_tokens, self._view)
                trajectory = recorded or trajectory
            assert trajectory is not None
            results.append(self._compare(prompt, ids, sides, trajectory))
            if self._view is not None:
                self._view.finished(results[-1])
        return results

    def without_adapter(
        self, prompts: list[tuple[Prompt, torch.Tensor]], results: list[PromptResult]
    ) -> Iterator[PromptResult]:
        """The results, each with `PromptResult.plain`: Jacobi decoding of the base alone, of the
        same window and untimed."""
        plain = Measurement(
            self._loaded, replace(self._config, verify_size=None), self._max_new_tokens
        )
        for (_, ids), result in zip(prompts, results, strict=True):
            _, trajectory = plain._decode("jacobi", ids, self._max_new_tokens, None)
            assert trajectory is not None
            yield replace(result, plain=trajectory.with_pieces(self._loaded.tokenizer))

    def _decode(
        self, side: Side, ids: torch.Tensor, limit: int, view: View | None
    ) -> tuple[SideResult, Trajectory | None]:
        model = self._loaded.model
        inputs: dict[str, Any] = {"input_ids": ids[None].to(self._device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs.update(do_sample=False, num_beams=1, max_new_tokens=limit)
        if model.generation_config.pad_token_id is None:
            inputs["pad_token_id"] = self._loaded.tokenizer.pad_token_id
        self._synchronise()
        clock = _Clock(side, view)
        trajectory: Trajectory | None = None
        if side == "jacobi":
            out = jacobi_generate(
                model,
                **inputs,
                config=self._config,
                adapter=self._adapter,
                streamer=clock,
                return_dict_in_generate=True,
            )
            self._synchronise()
            seconds = clock.seconds()
            assert isinstance(out, JacobiOutput)
            assert out.sequences is not None and out.forwards is not None and out.trajectories
            generated = out.sequences[0, ids.numel() :].tolist()
            forwards = out.forwards
            trajectory = out.trajectories[0]
        else:
            sequences = model.generate(**inputs, streamer=clock)
            self._synchronise()
            seconds = clock.seconds()
            generated = sequences[0, ids.numel() :].tolist()
            # one a token, the first of them over the whole prompt
            forwards = len(generated)
        return SideResult(generated, forwards, seconds), trajectory

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _compare(
        self,
        prompt: Prompt,
        ids: torch.Tensor,
        sides: dict[Side, SideResult],
        trajectory: Trajectory,
    ) -> PromptResult:
        tokenizer = self._loaded.tokenizer
        ours, theirs = sides["jacobi"].ids, sides["autoregressive"].ids
        verification, near_ties, difference = None, [], None
        if ours != theirs or self._loaded.model.dtype != torch.float32:
            # no view is running and no clock: this costs one forward over each sequence
            check = self._verify(ids, ours)
            verification = check.summary()
            near_ties = [(index, gap) for _, index, gap in check.near_ties()]
            if ours != theirs:
                pairs = zip(ours, theirs, strict=False)
                shared = min(len(ours), len(theirs))
                index = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
                other = self._verify(ids, theirs)
                difference = Difference(
                    index=index,
                    autoregressive=tokenizer.decode(theirs[index : index + 1]),
                    jacobi=tokenizer.decode(ours[index : index + 1]),
                    autoregressive_gap=_gap_at(other.gap, index),
                    jacobi_gap=_gap_at(check.gap, index),
                )
        return PromptResult(
            prompt=prompt,
            prompt_tokens=ids.numel(),
            text=tokenizer.decode(ours, skip_special_tokens=True),
            autoregressive=sides["autoregressive"],
            jacobi=sides["jacobi"],
            trajectory=trajectory.with_pieces(tokenizer),
            difference=difference,
            verification=verification,
            near_ties=near_ties,
        )

    def _verify(self, ids: torch.Tensor, generated: list[int]) -> Any:
        sequence = torch.cat([ids, torch.tensor(generated, dtype=torch.int64)])
        return verify(self._loaded.model, sequence[None].to(self._device), ids.numel())


def _gap_at(gap: torch.Tensor, index: int) -> float | None:
    return float(gap[0, index]) if index < gap.shape[1] else None
