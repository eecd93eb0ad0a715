from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.text_quality import (
    Cycle,
    longest_cycle,
    repeated_ngrams,
    repeated_sentences,
    sentences,
)

TOKENS = st.lists(st.integers(0, 3), max_size=24)


def test_repeated_ngrams_by_hand():
    assert repeated_ngrams([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_ngrams([7] * 10, n=4) == pytest.approx(1 - 1 / 7)
    # 1234 2345 3451 4512 5123 1234: one of six stood there before
    assert repeated_ngrams([1, 2, 3, 4, 5, 1, 2, 3, 4], n=4) == pytest.approx(1 / 6)
    assert repeated_ngrams([1, 1, 1], n=4) == 0.0
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        repeated_ngrams([1], n=0)


def test_longest_cycle_by_hand():
    assert longest_cycle([1, 2, 3, 4]) == Cycle(0, 0, 0)
    assert longest_cycle([9, 5, 5, 5, 8]) == Cycle(1, 3, 1)
    cycle = longest_cycle([9, 1, 2, 3, 1, 2, 3, 1, 2, 7])
    assert cycle == Cycle(1, 8, 3)
    assert cycle.repeats == pytest.approx(8 / 3)
    # once and a half is no repetition yet
    assert longest_cycle([1, 2, 3, 4, 1, 2]) == Cycle(0, 0, 0)
    assert longest_cycle([1, 2, 3, 1, 2, 3], max_period=2) == Cycle(0, 0, 0)
    assert longest_cycle([]).repeats == 0.0
    with pytest.raises(ValueError, match="max_period=0"):
        longest_cycle([1], max_period=0)


@given(TOKENS)
def test_longest_cycle_is_the_longest(tokens):
    """Against every slice of the text, tried one by one."""
    runs = [
        (stop - start, -period, -start)
        for start in range(len(tokens))
        for stop in range(start + 2, len(tokens) + 1)
        for period in range(1, (stop - start) // 2 + 1)
        if all(tokens[i] == tokens[i - period] for i in range(start + period, stop))
    ]
    length, period, start = max(runs, default=(0, 0, 0))
    assert longest_cycle(tokens) == Cycle(-start, length, -period)


@given(TOKENS, st.integers(1, 5))
def test_repeated_ngrams_counts_the_ones_seen_before(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    seen = [gram in grams[:index] for index, gram in enumerate(grams)]
    assert repeated_ngrams(tokens, n) == pytest.approx(sum(seen) / len(seen) if seen else 0.0)


def test_sentences():
    text = 'He paid $3.50.  "Why?" She  left!\n\n---\nHE PAID $3.50.\n- one. two'
    assert sentences(text) == [
        "he paid $3.50.", '"why?"', "she left!", "he paid $3.50.", "- one.", "two",
    ]  # fmt: skip
    assert repeated_sentences(text) == pytest.approx(1 / 6)
    assert repeated_sentences("...\n***") == 0.0


@given(st.lists(st.sampled_from(["The cat sat.", "It rained!", "Why?"]), max_size=8))
def test_repeated_sentences_share(parts):
    share = 1 - len(set(parts)) / len(parts) if parts else 0.0
    assert repeated_sentences(" ".join(parts)) == pytest.approx(share)
    assert repeated_sentences("\n".join(parts)) == pytest.approx(share)
