"""How much a text repeats itself: by tokens and by sentences.

A consistency LLM is easily trained into repeating itself, which makes it fast and worthless
(arXiv 2403.00835, section 3.1, filters such text out of its data). These measures are what
collecting cleans with and what evaluation reports.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# a sentence ends at . ! ? (closing quotes and brackets belong to it) before white space or a line's
# end: the point of "3.5" ends nothing
_END = re.compile(r"(?<=[.!?])[\"')\]]*(?=\s|$)")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Cycle:
    """A run of tokens that repeats with a fixed period.

    Attributes:
        start: index of its first token.
        length: tokens of the run, at least two periods; 0 where nothing repeats.
        period: tokens of the part that repeats.
    """

    start: int
    length: int
    period: int

    @property
    def repeats(self) -> float:
        """How many times the part stands there, the last one perhaps not whole."""
        return self.length / self.period if self.period else 0.0


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that stood in the text before: 1 - distinct / all.

    0 where every n-gram is new, and in a text of fewer than n tokens; a single token repeated T
    times gives 1 - 1 / (T - n + 1).

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    distinct = {tuple(tokens[index : index + n]) for index in range(total)}
    return 1.0 - len(distinct) / total


def longest_cycle(tokens: Sequence[Hashable], max_period: int = 64) -> Cycle:
    """The longest run in which every token equals the one `period` before it.

    A run of period p covers the p tokens before the first equal pair as well, and counts from two
    whole periods on. Of runs of one length the one of the shortest period is given, and of those
    the first.

    Raises:
        ValueError: if `max_period` is below 1.
    """
    if max_period < 1:
        raise ValueError(f"max_period={max_period} must be at least 1")
    best = Cycle(0, 0, 0)
    for period in range(1, min(max_period, len(tokens) // 2) + 1):
        equal = 0
        for index in range(period, len(tokens)):
            equal = equal + 1 if tokens[index] == tokens[index - period] else 0
            if equal >= period and equal + period > best.length:
                best = Cycle(index - period - equal + 1, equal + period, period)
    return best


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, white space evened out, lower case.

    A line's end always ends a sentence. What holds no letter and no digit (a rule, a bracket) is
    no sentence.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for end in [*(match.end() for match in _END.finditer(line)), len(line)]:
            sentence = " ".join(line[start:end].split()).casefold()
            if _WORD.search(sentence):
                found.append(sentence)
            start = end
    return found


def repeated_sentences(text: str) -> float:
    """Share of the sentences that stood in the text before: 1 - distinct / all; 0 without any."""
    found = sentences(text)
    return 1.0 - len(set(found)) / len(found) if found else 0.0
