"""Guesses from earlier predictions: the latest token behind each token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
import cllm_kernels
from cllm.decoding.pool import GuessPool

from .test_gated import greedy, random_adapter
from .tiny_models import prompts, tiny_model

V = 5
TOKENS = st.integers(0, V - 1)
ROWS = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=3)


@given(texts=ROWS, data=st.data(), forwards=st.integers(0, 4), width=st.integers(1, 5))
def test_the_latest_token_behind_each(texts, data, forwards, width):
    """Against a dictionary a row, with tokens that stand in a window twice."""
    longest = max(map(len, texts))
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    pool = GuessPool(padded, torch.tensor([len(text) for text in texts]), V)
    known = [dict(itertools.pairwise(text)) for text in texts]

    def block():
        tokens = st.lists(TOKENS, min_size=width, max_size=width)
        return [data.draw(tokens) for _ in texts]

    for _ in range(forwards):
        windows, predictions = block(), block()
        pool.add(torch.tensor(windows), torch.tensor(predictions))
        for row, window, predicted in zip(known, windows, predictions, strict=True):
            row.update(zip(window, predicted, strict=True))
    windows = block()
    found = chained(pool, torch.tensor(windows)).tolist()
    for row, window, improved in zip(known, windows, found, strict=True):
        expected = window[:1]
        for own in window[1:]:
            expected.append(row.get(expected[-1], own))
        assert improved == expected


def chained(pool, window):
    """The pool's chain behind a window's first token."""
    made = window.clone()
    cllm_kernels.guess_window(made, pool.latest)
    return made


def test_a_clone_goes_its_own_way_until_it_is_loaded():
    generator = torch.Generator().manual_seed(0)

    def draw(width):
        return torch.randint(V, (2, width), generator=generator)

    pool, other = (GuessPool(draw(6), torch.tensor([6, 4]), V) for _ in range(2))
    twin, window = pool.clone(), draw(5)
    pool.add(draw(3), draw(3))
    other.load(pool)
    for steps in range(3):
        assert torch.equal(chained(other, window), chained(pool, window)), steps
        tokens, predictions = draw(4), draw(4)
        other.add(tokens, predictions)
        pool.add(tokens, predictions)
    assert not torch.equal(twin.latest, pool.latest)
    assert twin.nbytes == pool.nbytes == 8 * 2 * (V + 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lookup", [0, 3])
def test_the_text_is_greedy_searchs(family, lookup):
    model, inputs = tiny_model(family), prompts([21, 6, 13])
    expected = greedy(model, inputs, max_new_tokens=40)
    for block_size in (1, 2, 5, 16):
        for adapter in (None, random_adapter(family, 0.05)):
            found = cllm.generate(
                model, **inputs, max_new_tokens=40, block_size=block_size, lookup=lookup,
                pool=True, adapter=adapter,
            )  # fmt: skip
            assert torch.equal(found, expected)


def test_it_saves_forwards_and_rows_do_not_see_each_other():
    model, inputs = tiny_model("llama"), prompts([21, 6, 13])
    settings = dict(max_new_tokens=60, block_size=6, lookup=0, return_dict_in_generate=True)
    plain = cllm.generate(model, **inputs, **settings)
    found = cllm.generate(model, **inputs, pool=True, **settings)
    assert torch.equal(found.sequences, plain.sequences)
    assert found.forwards < 0.9 * plain.forwards
    for row in range(3):
        mask = inputs["attention_mask"][row].bool()
        alone = cllm.generate(model, inputs["input_ids"][row][mask][None], pool=True, **settings)
        assert alone.iterations.tolist() == [found.iterations[row].item()]


def test_what_none_stands_for():
    config = cllm.JacobiConfig
    assert config().pools(gated=False) and not config().pools(gated=True)
    assert not config(lookup=0).pools(gated=False) and not config(mode="block").pools(gated=False)
    assert config(lookup=0, pool=True).pools(gated=True)
    assert config().least_lookup(gated=False) == config().least_lookup(gated=True) == 2
    assert config(pool=False).least_lookup(gated=False) == 1
    assert config(lookup=1).least_lookup(gated=False) == 1
    assert config(lookup_least=3).least_lookup(gated=False) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": 1}, "pool must be None, True or False, not 1"),
        ({"pool": True, "mode": "block"}, "pool=True needs mode='sliding'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        cllm.JacobiConfig(**settings)
