"""Guesses that are looked up in the text."""

from __future__ import annotations

import pytest
import torch

import cllm

from .test_gated import greedy, random_adapter
from .tiny_models import prompts, tiny_model


def followed(text, longest, count):
    """What followed the latest of the longest earlier occurrences of a text's end, written out."""
    for length in range(min(longest, len(text) - 1), 0, -1):
        for place in range(len(text) - length - 1, -1, -1):
            if text[place : place + length] == text[-length:]:
                since = text[place + length :]
                return [since[i % len(since)] for i in range(count)]
    return None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lookup", [0, 1, 4])
def test_the_text_is_greedy_searchs(family, lookup):
    model, inputs = tiny_model(family), prompts([21, 6, 13])
    expected = greedy(model, inputs, max_new_tokens=40)
    for block_size in (2, 5, 16):
        found = cllm.generate(
            model, **inputs, max_new_tokens=40, block_size=block_size, lookup=lookup
        )
        assert torch.equal(found, expected)


def test_it_saves_forwards_and_rows_do_not_see_each_other():
    model = tiny_model("llama")
    inputs = prompts([21, 6, 13])
    settings = dict(max_new_tokens=60, block_size=6, return_dict_in_generate=True)
    plain = cllm.generate(model, **inputs, lookup=0, **settings)
    found = cllm.generate(model, **inputs, **settings)
    assert torch.equal(found.sequences, plain.sequences)
    # random weights soon repeat themselves
    assert found.forwards < 0.8 * plain.forwards
    for row in range(3):
        mask = inputs["attention_mask"][row].bool()
        alone = cllm.generate(
            model,
            input_ids=inputs["input_ids"][row][mask][None],
            attention_mask=mask[mask].long()[None],
            **settings,
        )
        assert alone.iterations.tolist() == [found.iterations[row].item()]


def test_recorded_windows_hold_what_was_looked_up():
    model, inputs = tiny_model("llama"), prompts([9])
    out = cllm.generate(
        model,
        **inputs,
        max_new_tokens=40,
        block_size=5,
        lookup=3,
        lookup_least=1,
        guesses="ordered",
        record_trajectories=True,
        return_dict_in_generate=True,
    )
    trajectory = out.trajectories[0]
    text = trajectory.prompt + trajectory.tokens
    looked_up = 0
    for iteration in trajectory.iterations:
        known = text[: len(trajectory.prompt) + iteration.position]
        guesses = followed(known, 3, 4)
        assert iteration.window[0] == known[-1]
        if guesses:
            looked_up += 1
            assert iteration.window[1:] == guesses
    assert looked_up > 5


def test_an_adapters_guesses_give_way_to_longer_ends_only():
    model, inputs = tiny_model("qwen3"), prompts([21])
    settings = dict(max_new_tokens=50, block_size=6, return_dict_in_generate=True)
    adapter = random_adapter("qwen3", 0.05)
    outs = [
        cllm.generate(model, **inputs, adapter=adapter, **settings, **least)
        for least in ({}, {"lookup_least": 2}, {"lookup": 0})
    ]
    assert outs[0].forwards == outs[1].forwards < outs[2].forwards
    assert torch.equal(outs[0].sequences, outs[2].sequences)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lookup": -1}, "lookup must be None or an integer >= 0, not -1"),
        ({"lookup": 2.0}, "lookup must be None or an integer"),
        ({"lookup": 3, "mode": "block"}, "lookup=3 needs mode='sliding'"),
        ({"lookup_least": 0}, "lookup_least must be None or an integer from 1 to lookup, not 0"),
        ({"lookup": 2, "lookup_least": 3}, "from 1 to lookup=2, not 3"),
        ({"lookup": 0, "lookup_least": 1}, "from 1 to lookup=0, not 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        cllm.JacobiConfig(**settings)


def test_what_none_stands_for():
    assert cllm.JacobiConfig().longest_lookup == 8
    assert cllm.JacobiConfig(candidates=2).longest_lookup == 8
    assert cllm.JacobiConfig(mode="block").longest_lookup == 0
    assert cllm.JacobiConfig(lookup_least=9).longest_lookup == 9
    assert cllm.JacobiConfig(lookup=0).longest_lookup == 0
