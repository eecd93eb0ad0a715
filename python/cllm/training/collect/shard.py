"""From prompts to trajectories: what happens to the rows of one shard."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...fill import Fill
from ...prompts import context_length, encode
from ..examples import TrainingExample
from .block_parallel import Collected, collect_states, sample_blocks
from .cleaning import DUPLICATE, NOT_ITS_OWN, RESPONSE_LONG, RESPONSE_SHORT, Cleaning
from .responses import Responder, brought_tokens, respond, with_end
from .sources import Row

# told of how many prompts a stage has dealt with, and how many response tokens are finished
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CollectOptions:
    """Settings of collecting; all of them change the rows.

    Attributes:
        block_size: n, tokens of a block.
        fill, seed: the initial guess of every block (`cllm.JacobiConfig.fill`).
        max_new_tokens: longest response.
        batch_size: prompts in one forward. In 16-bit precision it may decide near-ties.
        shard_size: prompts of a shard.
        block_share: share of each response's blocks to iterate, drawn by seed and id; 0: responses
            alone, without trajectories.
        tolerance: how far below the largest logit a response's token may lie and still be the
            model's own: where the rounding of two forwards decides between two tokens.
        cleaning: what is left out.
        system: system message of the chat template.
        chat_template: False feeds prompts as they stand.

    Raises:
        ValueError: naming every field that has a bad value.
    """

    block_size: int = 16
    fill: Fill = "prompt"
    seed: int = 0
    max_new_tokens: int = 512
    batch_size: int = 8
    shard_size: int = 32
    block_share: float = 1.0
    tolerance: float = 1e-3
    cleaning: Cleaning = field(default_factory=Cleaning)
    system: str | None = None
    chat_template: bool = True

    def __post_init__(self) -> None:
        problems = []
        for name in ("block_size", "max_new_tokens", "batch_size", "shard_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} must be an integer >= 1, not {value!r}")
        if not 0 <= self.block_share <= 1:
            problems.append(f"block_share must lie in [0, 1], not {self.block_share!r}")
        if not problems and self.block_size > self.max_new_tokens:
            problems.append(
                f"block_size={self.block_size} is larger than every response: max_new_tokens is "
                f"{self.max_new_tokens}"
            )
        if problems:
            raise ValueError("collecting: " + "; ".join(problems))


@dataclass
class ShardResult:
    """The rows of one shard, and what became of the others.

    Attributes:
        examples: in the source's order.
        dropped: reason to count.
        counts: "checked" responses, of them "mismatched" ones, and "near_ties", tokens of the
            others that are not the likeliest.
        seconds: by stage.
    """

    examples: list[TrainingExample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to a stage's."""
        started = time.perf_counter()
        yield
        spent = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self.seconds[stage] = spent


@dataclass
class _Candidate:
    row: Row
    prompt: list[int]
    response: list[int] = field(default_factory=list)


class ShardMaker:
    """Makes shards with one model.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's.
        responder: gives greedy responses (`cllm.responders.make_responder`); of brought responses
            it says where they end.
        options: settings.
        ends: the model's end-of-text ids.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        responder: Responder,
        options: CollectOptions,
        ends: frozenset[int],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._responder, self._options, self._ends = responder, options, ends
        self._context = context_length(model)

    def make(
        self, rows: Sequence[Row], first: Sequence[bool], advance: Advance | None = None
    ) -> ShardResult:
        """Trajectories of the model's responses to `rows`.

        Args:
            first: per row, whether its prompt did not stand in the source before.
            advance: is told of the progress.

        Raises:
            PromptError: a prompt that cannot be encoded, a brought id outside the vocabulary.
            ValueError: NaN among the logits.
        """
        result = ShardResult()
        tell = advance or (lambda stage, prompts, tokens: None)
        with result.timed("responses"):
            candidates = self._prompts(rows, first, result)
            tell("responses", len(rows) - len(candidates), 0)
            if any(candidate.row.response is not None for candidate in candidates):
                self._bring(candidates, tell)
            else:
                self._respond(candidates, tell)
            kept = [candidate for candidate in candidates if self._clean(candidate, result)]
        with result.timed("states"):
            tell("states", len(rows) - len(kept), 0)
            self._collect(kept, result, tell)
        return result

    def _prompts(
        self, rows: Sequence[Row], first: Sequence[bool], result: ShardResult
    ) -> list[_Candidate]:
        options, found = self._options, []
        for row, new in zip(rows, first, strict=True):
            if options.cleaning.dedup and not new:
                result.dropped[DUPLICATE] += 1
                continue
            tokens = encode(
                self._tokenizer,
                row.prompt,
                system=options.system,
                chat_template=options.chat_template,
            ).tolist()
            reason = options.cleaning.prompt(len(tokens), self._context)
            if reason is None:
                found.append(_Candidate(row, tokens))
            else:
                result.dropped[reason] += 1
        return found

    def _respond(self, candidates: list[_Candidate], tell: Advance) -> None:
        def responder(prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
            answers = self._responder(prompts, limit)
            tell("responses", len(answers), 0)
            return answers

        responses = respond(
            responder,
            [candidate.prompt for candidate in candidates],
            max_new_tokens=self._options.max_new_tokens,
            batch_size=self._options.batch_size,
            context=self._context,
        )
        for candidate, response in zip(candidates, responses, strict=True):
            candidate.response = response

    def _bring(self, candidates: list[_Candidate], tell: Advance) -> None:
        limit = self._options.max_new_tokens
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        for candidate in candidates:
            assert candidate.row.response is not None
            candidate.response = brought_tokens(
                self._tokenizer,
                candidate.prompt,
                candidate.row.response,
                vocab_size=vocabulary,
                ends=self._ends,
                where=candidate.row.prompt.where,
            )[:limit]
        # one that fills the limit is cut there, whatever the model would say next
        short = [c for c in candidates if len(c.response) < limit]
        completed = with_end(
            self._responder,
            [candidate.prompt for candidate in short],
            [candidate.response for candidate in short],
            ends=self._ends,
            batch_size=self._options.batch_size,
            context=self._context,
        )
        for candidate, response in zip(short, completed, strict=True):
            candidate.response = response
        tell("responses", len(candidates), 0)

    def _clean(self, candidate: _Candidate, result: ShardResult) -> bool:
        tokens = candidate.response
        if not tokens:
            reason: str | None = RESPONSE_SHORT
        elif self._context is not None and len(candidate.prompt) + len(tokens) > self._context:
            reason = RESPONSE_LONG
        else:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            ended = tokens[-1] in self._ends
            reason = self._options.cleaning.response(tokens, text, ended=ended)
        if reason is not None:
            result.dropped[reason] += 1
        return reason is None

    def _collect(self, kept: list[_Candidate], result: ShardResult, tell: Advance) -> None:
        options, size = self._options, self._options.batch_size
        order = sorted(range(len(kept)), key=lambda i: len(kept[i].prompt) + len(kept[i].response))
        found: dict[int, TrainingExample] = {}
        for start in range(0, len(order), size):
            members = order[start : start + size]
            names = [kept[index].row.prompt.id for index in members]
            responses = [kept[index].response for index in members]
            collected = collect_states(
                self._model,
                [kept[index].prompt for index in members],
                responses,
                block_size=options.block_size,
                fill=options.fill,
                seed=options.seed,
                ids=names,
                blocks=[
                    sample_blocks(
                        len(response),
                        options.block_size,
                        options.block_share,
                        seed=options.seed,
                        id=name,
                    )
                    for name, response in zip(names, responses, strict=True)
                ],
                pad_token_id=self._tokenizer.pad_token_id or 0,
                max_rows=size,
            )
            for index, entry in zip(members, collected, strict=True):
                if self._is_own(entry, result):
                    found[index] = entry.example
            tell("states", len(members), sum(map(len, responses)))
        result.examples = [found[index] for index in sorted(found)]

    def _is_own(self, entry: Collected, result: ShardResult) -> bool:
        if any(math.isnan(gap) for gap in entry.gaps):
            raise ValueError(
                f"the model gives NaN logits for the response of {entry.example.id}: its weights "
                "are damaged, or the precision is too low for it; try --dtype bfloat16 or float32"
            )
        own = all(gap <= self._options.tolerance for gap in entry.gaps)
        result.counts["checked"] += 1
        if own:
            result.counts["near_ties"] += len(entry.gaps)
        else:
            result.counts["mismatched"] += 1
            result.dropped[NOT_ITS_OWN] += 1
        return own
