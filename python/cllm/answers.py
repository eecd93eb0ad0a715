"""The number that a worked answer ends on: GSM8K's ``#### 42``, or a text's last number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# a sign only where no digit or letter stands before it: "16-3" holds 16 and 3
_NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")
_MARKED = re.compile(r"####\s*([^\n]*)")


def final_answer(text: str) -> Decimal | None:
    """The number that `text` ends on (GSM8K, Cobbe et al. 2021, arXiv 2110.14168).

    The number behind the last ``####`` counts; without one, or with none behind it, the last number
    of the text. Thousands commas, dollar signs and trailing zeros make no difference.

    Returns:
        The number, or None if the text holds none.
    """
    marked = _MARKED.findall(text)
    for part in ([marked[-1]] if marked else []) + [text]:
        numbers = _NUMBER.findall(part)
        if numbers:
            # behind the mark stands the answer first, units may follow; in free text it comes last
            chosen = numbers[0] if part is not text else numbers[-1]
            return _value(chosen)
    return None


def answer_matches(text: str, reference: str) -> bool:
    """Whether both texts end on the same number.

    Raises:
        ValueError: if the reference holds no number.
    """
    expected = final_answer(reference)
    if expected is None:
        raise ValueError(f"the reference answer holds no number: {reference[-60:]!r}")
    return final_answer(text) == expected


def answer_accuracy(texts: Sequence[str], references: Sequence[str]) -> float:
    """The share of `texts` that end on the number of their reference, 0 to 1.

    Raises:
        ValueError: if the two differ in length, are empty, or a reference holds no number.
    """
    if len(texts) != len(references):
        raise ValueError(f"there are {len(texts)} texts but {len(references)} reference answers")
    if not texts:
        raise ValueError("there are no texts to score")
    pairs = zip(texts, references, strict=True)
    return sum(answer_matches(text, reference) for text, reference in pairs) / len(texts)


def _value(number: str) -> Decimal | None:
    plain = number.replace("$", "").replace(",", "").replace("\u2212", "-")
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None
