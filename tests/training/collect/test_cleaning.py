from __future__ import annotations

import pytest

from cllm.prompts import Prompt
from cllm.training.collect.cleaning import (
    BEYOND_CONTEXT,
    CUT,
    PROMPT_LONG,
    PROMPT_SHORT,
    REPEATED_SENTENCES,
    REPEATED_TOKENS,
    RESPONSE_LONG,
    RESPONSE_SHORT,
    Cleaning,
    first_of_each,
    summed,
)

FINE = list(range(40))
SENTENCES = "He ran. She sat. He ran. He ran."


def test_prompts():
    rules = Cleaning(min_prompt_tokens=3, max_prompt_tokens=10)
    assert rules.prompt(10, 100) is None and rules.prompt(3, None) is None
    assert rules.prompt(2, 100) == PROMPT_SHORT
    assert rules.prompt(11, 100) == PROMPT_LONG
    # one position must be left for the response
    assert rules.prompt(8, 9) is None
    assert rules.prompt(9, 9) == BEYOND_CONTEXT


def test_response_lengths_and_ends():
    rules = Cleaning(min_response_tokens=3, max_response_tokens=40)
    assert rules.response(FINE, "fine", ended=True) is None
    assert rules.response(FINE, "fine", ended=False) is None
    assert rules.response(FINE[:2], "", ended=True) == RESPONSE_SHORT
    assert rules.response([*FINE, 50], "", ended=True) == RESPONSE_LONG
    assert Cleaning(keep_cut=False).response(FINE, "", ended=False) == CUT
    assert Cleaning(keep_cut=False).response(FINE, "", ended=True) is None


def test_token_repetition():
    off = {"max_cycle": 1.0, "max_repeated_ngrams": 1.0}
    collapsed = [*FINE, *[7, 8] * 10]  # a third of the text, 17 of 57 4-grams
    assert Cleaning().response(collapsed, "", ended=False) == REPEATED_TOKENS
    assert Cleaning(max_cycle=0.4).response(collapsed, "", ended=False) is None
    only_ngrams = Cleaning(max_cycle=1.0, max_repeated_ngrams=0.2)
    assert only_ngrams.response(collapsed, "", ended=False) == REPEATED_TOKENS
    assert Cleaning(**off).response([7] * 40, "", ended=False) is None
    # said twice is not collapsed, whatever its share
    assert Cleaning().response([*FINE, *FINE], "", ended=True) is None


def test_sentence_repetition():
    assert Cleaning().response(FINE, SENTENCES, ended=True) == REPEATED_SENTENCES
    assert Cleaning(max_repeated_sentences=0.5).response(FINE, SENTENCES, ended=True) is None


def test_duplicates_by_text_and_turns():
    turn = {"role": "user", "content": "x"}
    prompts = [
        Prompt("0", "a  b"),
        Prompt("1", " a\nb"),
        Prompt("2", "A b"),
        Prompt("3", "a b", before=[turn]),
        Prompt("4", "a b", before=[dict(turn, content=" x ")]),
    ]
    assert first_of_each(prompts) == [True, False, True, True, False]


def test_counts_are_added_up():
    assert summed([{"a": 1, "b": 1}, {"b": 2}, {}]) == {"b": 3, "a": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cycle": 1.5}, "max_cycle must lie between 0 and 1, not 1.5"),
        ({"max_repeated_ngrams": float("nan")}, "max_repeated_ngrams must lie"),
        ({"min_prompt_tokens": 0}, "min_prompt_tokens must be at least 1"),
        ({"min_response_tokens": 9, "max_response_tokens": 8}, "max_response_tokens=8 is below"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Cleaning(**settings)
