"""Which prompts and responses are left out of the data, and the count of each reason.

The published model collapses into repetition without such filters (arXiv 2403.00835, section 3.1:
token- and sentence-level repetition is filtered out).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...text_quality import longest_cycle, repeated_ngrams, repeated_sentences

DUPLICATE = "prompt seen before"
BEYOND_CONTEXT = "prompt longer than the context"
PROMPT_SHORT = "prompt too short"
PROMPT_LONG = "prompt too long"
RESPONSE_SHORT = "response too short"
RESPONSE_LONG = "response too long"
CUT = "response cut by the limit"
REPEATED_TOKENS = "repeated tokens"
REPEATED_SENTENCES = "repeated sentences"
NOT_ITS_OWN = "not the model's output"

# a cycle counts as a collapse from this many repeats on, however long it is
_FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Cleaning:
    """What a prompt and a response must be like to be kept.

    Attributes:
        dedup: drop a prompt whose text, white space evened out, stood in the source before.
        min_prompt_tokens, max_prompt_tokens: of the encoded prompt; None: no limit.
        min_response_tokens, max_response_tokens: the end-of-text token counted; None: no limit.
        keep_cut: keep responses that the limit on new tokens cut off before their end.
        max_repeated_ngrams: largest share of 4-grams of tokens that stood in the response before
            (`cllm.text_quality.repeated_ngrams`).
        max_cycle: largest share of the response that one run of a repeated cycle may cover
            (`cllm.text_quality.longest_cycle`), from three repeats on.
        max_repeated_sentences: largest share of sentences and lines that stood in the response
            before (`cllm.text_quality.repeated_sentences`).

    A share of 1 switches its filter off.

    Raises:
        ValueError: naming every field that has a bad value.
    """

    dedup: bool = True
    min_prompt_tokens: int = 1
    max_prompt_tokens: int | None = None
    min_response_tokens: int = 2
    max_response_tokens: int | None = None
    keep_cut: bool = True
    max_repeated_ngrams: float = 0.5
    max_cycle: float = 0.25
    max_repeated_sentences: float = 0.3

    def __post_init__(self) -> None:
        problems = []
        for side in ("prompt", "response"):
            low, high = getattr(self, f"min_{side}_tokens"), getattr(self, f"max_{side}_tokens")
            if low < 1:
                problems.append(f"min_{side}_tokens must be at least 1, not {low!r}")
            if high is not None and high < low:
                problems.append(f"max_{side}_tokens={high} is below min_{side}_tokens={low}")
        for name in ("max_repeated_ngrams", "max_cycle", "max_repeated_sentences"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                problems.append(f"{name} must lie between 0 and 1, not {value!r}")
        if problems:
            raise ValueError("Cleaning: " + "; ".join(problems))

    def prompt(self, tokens: int, context: int | None) -> str | None:
        """Why a prompt of so many tokens is dropped, or None.

        Args:
            context: positions of the model; the prompt must leave one for the response.
        """
        if context is not None and tokens >= context:
            return BEYOND_CONTEXT
        if tokens < self.min_prompt_tokens:
            return PROMPT_SHORT
        if self.max_prompt_tokens is not None and tokens > self.max_prompt_tokens:
            return PROMPT_LONG
        return None

    def response(self, tokens: Sequence[int], text: str, *, ended: bool) -> str | None:
        """Why a response is dropped, or None.

        Args:
            tokens: [T] ids, the end-of-text token included where it ended.
            text: of the same, without special tokens.
            ended: whether the model ended it; False where the limit cut it off.
        """
        if not ended and not self.keep_cut:
            return CUT
        if len(tokens) < self.min_response_tokens:
            return RESPONSE_SHORT
        if self.max_response_tokens is not None and len(tokens) > self.max_response_tokens:
            return RESPONSE_LONG
        if repeated_ngrams(tokens) > self.max_repeated_ngrams:
            return REPEATED_TOKENS
        if self.max_cycle < 1:
            cycle = longest_cycle(tokens)
            share = cycle.length / len(tokens)
            if cycle.repeats >= _FEWEST_REPEATS and share > self.max_cycle:
                return REPEATED_TOKENS
        if repeated_sentences(text) > self.max_repeated_sentences:
            return REPEATED_SENTENCES
        return None


def first_of_each(prompts: Iterable[Any]) -> list[bool]:
    """Per `cllm.prompts.Prompt`, whether none before it says the same, white space aside."""
    seen: set[tuple[Any, ...]] = set()
    first = []
    for prompt in prompts:
        before = ((turn["role"], " ".join(turn["content"].split())) for turn in prompt.before)
        key = (" ".join(prompt.text.split()), *before)
        first.append(key not in seen)
        seen.add(key)
    return first


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Reason to count, added up, the most frequent first."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
