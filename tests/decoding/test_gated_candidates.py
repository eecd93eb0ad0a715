"""Several candidates with an adapter: still the base model's text, in fewer forwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm

from .test_candidates import FAMILIES, check_recorded
from .test_gated import STRENGTHS, greedy, random_adapter, without_effect
from .tiny_models import prompts, tiny_model


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_greedy_searchs_of_the_base(family, strength):
    model, adapter = tiny_model(family), random_adapter(family, STRENGTHS[strength])
    inputs = prompts([21, 6, 13])
    expected = greedy(model, inputs, max_new_tokens=40)
    for changes in (
        {"block_size": 2, "candidates": 2},
        {"block_size": 5, "candidates": 3, "pool": False},
        {"block_size": 7, "candidates": 4, "lookup": 0, "fill": "last"},
        {"block_size": 4, "candidates": 2, "lookup": 0, "pool": False},
        {"block_size": 1, "candidates": 2},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=40, adapter=adapter, **changes)
        assert torch.equal(found, expected), changes


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    new_tokens=st.integers(1, 24),
    block_size=st.integers(1, 9),
    candidates=st.integers(2, 4),
    lookup=st.sampled_from([0, 1, 3]),
    pool=st.sampled_from([None, True, False]),
    accept=st.sampled_from(["all", "one"]),
    strength=st.sampled_from(sorted(STRENGTHS)),
    sampled=st.sampled_from([{}, {"do_sample": True, "seed": 5, "top_k": 9}]),
    processors=st.sampled_from([{}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}]),
    seed=st.integers(0, 96),
)
def test_one_text_for_every_number_of_them(
    lengths, new_tokens, block_size, candidates, lookup, pool, accept, strength, sampled,
    processors, seed,
):  # fmt: skip
    model, inputs = tiny_model("qwen3"), prompts(lengths, seed=seed)
    settings = dict(max_new_tokens=new_tokens, **sampled, **processors)
    expected = cllm.generate(model, **inputs, block_size=1, **settings)
    adapter = random_adapter("qwen3", STRENGTHS[strength], seed % 3)
    output = cllm.generate(
        model, **inputs, block_size=block_size, candidates=candidates, lookup=lookup, pool=pool,
        accept=accept, adapter=adapter, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    assert torch.equal(output.sequences, expected)
    assert bool((output.iterations <= output.accepted).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_ties_do_not_hang_on_which_of_them_it_is(dtype):
    """Native layers give a token the same bits in every candidate, and at every width."""
    model, adapter = tiny_model("llama", dtype), random_adapter("llama", 1e30)
    for seed in range(3):
        inputs = prompts([30, 8], seed=seed)
        expected = cllm.generate(model, **inputs, max_new_tokens=60, block_size=4)
        for candidates in (2, 3):
            found = cllm.generate(
                model, **inputs, max_new_tokens=60, block_size=4, candidates=candidates,
                adapter=adapter,
            )  # fmt: skip
            assert torch.equal(found, expected)


def test_they_take_fewer_forwards_than_either_source_alone():
    """An adapter without effect guesses what plain Jacobi iteration has left over."""
    model, adapter, forwards = tiny_model("llama"), without_effect("llama"), {}
    for name, settings in {
        "leftover": {"lookup": 0},
        "known": {"pool": True},
        "two": {"candidates": 2},
        "four": {"candidates": 4},
    }.items():
        outs = [
            cllm.generate(
                model, **prompts([24], seed=seed), max_new_tokens=60, block_size=6,
                adapter=adapter, return_dict_in_generate=True, **settings,
            )
            for seed in range(6)
        ]  # fmt: skip
        forwards[name] = sum(out.forwards for out in outs)
    assert forwards["leftover"] > forwards["two"]
    assert forwards["known"] > forwards["two"] > forwards["four"]


def test_what_is_recorded_is_the_window_that_was_kept():
    model, inputs = tiny_model("llama"), prompts([24])
    out = cllm.generate(
        model, **inputs, max_new_tokens=60, block_size=6, candidates=2, record_trajectories=True,
        adapter=random_adapter("llama", 0.05), return_dict_in_generate=True,
    )  # fmt: skip
    assert out.verify_size == 6
    check_recorded(out, 6)


def test_the_pool_comes_with_them():
    assert not cllm.JacobiConfig().pools(gated=True)
    assert cllm.JacobiConfig(candidates=2).pools(gated=True)
    assert not cllm.JacobiConfig(candidates=2, lookup=0).pools(gated=True)
    assert not cllm.JacobiConfig(candidates=2, pool=False).pools(gated=True)


def test_sizes_of_a_call_without_a_block_size():
    out = cllm.generate(
        tiny_model("llama"), **prompts([6]), max_new_tokens=4, candidates=2,
        adapter=random_adapter("llama", 0.05), return_dict_in_generate=True,
    )  # fmt: skip
    assert (out.block_size, out.verify_size) == (4, 4)
