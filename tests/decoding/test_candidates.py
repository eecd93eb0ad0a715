"""Several candidates in one forward: the same text in fewer forwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm.decoding.candidates import CandidateIteration
from cllm.decoding.forward import BlockForward

from .test_gated import greedy, random_adapter
from .tiny_models import prompts, tiny_model

# native layers; sliding windows; masks added to the scores; latent attention; names its attention
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "gemma2", "gpt2", "deepseek-v3", "falcon"]


@pytest.fixture
def kept(monkeypatch):
    """The candidates that calls have kept, all rows of all forwards."""
    found = []
    own = BlockForward.keep

    def keep(self, lengths, candidate, width):
        found.extend(candidate.tolist())
        own(self, lengths, candidate, width)

    monkeypatch.setattr(BlockForward, "keep", keep)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_greedy_searchs(family, kept):
    model = tiny_model(family)
    for seed in (0, 4):
        inputs = prompts([21, 6, 13], seed=seed)
        expected = greedy(model, inputs, max_new_tokens=40)
        for block_size, candidates, lookup in ((2, 2, 3), (5, 3, 0), (7, 4, 3)):
            found = cllm.generate(
                model, **inputs, max_new_tokens=40, block_size=block_size, candidates=candidates,
                lookup=lookup, pool=True,
            )  # fmt: skip
            assert torch.equal(found, expected)
    # what the cache was given of them is read from then on (this GPT-2 repeats one token)
    assert max(kept) > 0 or family == "gpt2"


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    new_tokens=st.integers(1, 24),
    block_size=st.integers(1, 9),
    candidates=st.integers(2, 4),
    lookup=st.sampled_from([0, 1, 3]),
    pool=st.booleans(),
    fill=st.sampled_from(["prompt", "last"]),
    accept=st.sampled_from(["all", "one"]),
    sampled=st.sampled_from(
        [{}, {"do_sample": True, "seed": 5}, {"do_sample": True, "seed": 5, "top_k": 9}]
    ),
    processors=st.sampled_from([{}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}]),
    seed=st.integers(0, 96),
)
def test_one_text_for_every_number_of_them(
    lengths, new_tokens, block_size, candidates, lookup, pool, fill, accept, sampled, processors,
    seed,
):  # fmt: skip
    model, inputs = tiny_model("qwen3"), prompts(lengths, seed=seed)
    settings = dict(max_new_tokens=new_tokens, **sampled, **processors)
    expected = cllm.generate(model, **inputs, block_size=1, **settings)
    found = cllm.generate(
        model, **inputs, block_size=block_size, candidates=candidates, lookup=lookup, pool=pool,
        fill=fill, accept=accept, **settings,
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_ties_do_not_hang_on_which_of_them_it_is(dtype, kept):
    """Native layers give a token the same bits in every candidate, and at every width."""
    model = tiny_model("llama", dtype)
    for seed in range(3):
        inputs = prompts([30, 8], seed=seed)
        expected = cllm.generate(model, **inputs, max_new_tokens=60, block_size=4)
        found = cllm.generate(model, **inputs, max_new_tokens=60, block_size=4, candidates=3)
        assert torch.equal(found, expected)
    assert max(kept) > 0


def test_they_take_fewer_forwards():
    forwards = []
    for candidates in (1, 2, 4):
        outs = [
            cllm.generate(
                tiny_model(family), **prompts([24], seed=seed), max_new_tokens=60, block_size=6,
                candidates=candidates, lookup=3, return_dict_in_generate=True,
            )
            for family in ("llama", "qwen3")
            for seed in range(6)
        ]  # fmt: skip
        forwards.append(sum(out.forwards for out in outs))
    assert forwards[0] > forwards[1] > forwards[2]


@pytest.mark.parametrize("adapter", [None, 0.05])
@pytest.mark.parametrize("count", [2, 4])
def test_which_they_are(adapter, count, monkeypatch):
    """They go on from the same token; an adapter's guesses are one of the first two; and mostly
    they begin with different guesses."""
    seen = []
    own = CandidateIteration._candidates

    def candidates(iteration, end):
        window = iteration.state.window.clone()
        seen.append((window, own(iteration, end)))
        return seen[-1][1]

    monkeypatch.setattr(CandidateIteration, "_candidates", candidates)
    given = None if adapter is None else random_adapter("llama", adapter)
    cllm.generate(
        tiny_model("llama"), **prompts([21, 6]), max_new_tokens=40, block_size=5, candidates=count,
        adapter=given,
    )  # fmt: skip
    differ = 0
    for window, windows in seen:
        assert windows.shape == (2, count, 5)
        assert (windows[:, :, :1] == window[:, None, :1]).all()
        same = (windows == window[:, None]).all(dim=2)
        if adapter is not None:
            assert same[:, :2].any(dim=1).all()
        begun = windows[:, :, 1].tolist()
        differ += sum(len(set(row)) > 1 for row in begun)
    assert differ > len(seen)


def check_recorded(out, width):
    """The one trajectory of a call is that of its text, in windows of this width."""
    (trajectory,) = out.trajectories
    assert trajectory.tokens == out.sequences[0, 24:].tolist()
    assert sum(one.accepted for one in trajectory.iterations) == len(trajectory.tokens)
    for one in trajectory.iterations:
        right = 1
        while right < width and one.window[right] == one.predictions[right - 1]:
            right += 1
        assert one.exact == right and len(one.window) == len(one.predictions) == width


def test_what_is_recorded_is_the_window_that_was_kept():
    model, inputs = tiny_model("llama"), prompts([24])
    out = cllm.generate(
        model, **inputs, max_new_tokens=60, block_size=6, candidates=3, record_trajectories=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    check_recorded(out, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be an integer from 1 to 32, not 0"),
        ({"candidates": 33}, "candidates must be an integer from 1 to 32, not 33"),
        ({"candidates": 2, "mode": "block"}, "candidates=2 needs mode='sliding'"),
        ({"candidates": 2, "verify_size": 3, "block_size": 4}, "leave verify_size None"),
        ({"candidates": 2, "block_size": "auto"}, "leave candidates 1"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        cllm.JacobiConfig(**settings)
    assert "\n" not in str(error.value)


def test_what_has_no_place_for_several_is_refused():
    inputs = prompts([6])
    with pytest.raises(cllm.UnsupportedModelError, match="two rows cannot share one"):
        cllm.generate(tiny_model("bloom"), **inputs, candidates=2)
    # where nothing is guessed there is nothing to have several of
    alone = cllm.generate(
        tiny_model("bloom"), **inputs, max_new_tokens=5, block_size=1, candidates=2
    )
    assert torch.equal(alone, greedy(tiny_model("bloom"), inputs, max_new_tokens=5))
    assert cllm.JacobiConfig(candidates=4).on("cpu", 8).block_size == 2
