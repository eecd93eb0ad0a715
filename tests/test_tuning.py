"""`cllm.tune`: both factors are real measurements, and the verdict follows from them."""

from __future__ import annotations

import math

import pytest
import torch

import cllm
from cllm import GatedAdapter
from cllm.tuning import ONE, Candidate, Measured, Spread, Tuning, Window, _finalists
from tests.adapter.adapters import digest
from tests.decoding.tiny_models import fresh_model, prompts, tiny_model
from tests.decoding.tokenizer import letters_tokenizer
from tests.one_thread import one_thread

__all__ = ["one_thread"]

QUICK = dict(max_new_tokens=12, rounds=2, forwards=3, repeats=1)


def rows(*lengths: int) -> list[list[int]]:
    return [prompts([length], seed=length)["input_ids"][0].tolist() for length in lengths]


def decoded(model, ids, **settings):
    tokens = forwards = 0
    for row in ids:
        out = cllm.generate(
            model, torch.tensor([row]), max_new_tokens=12, return_dict_in_generate=True, **settings
        )
        tokens, forwards = tokens + int(out.accepted.sum()), forwards + out.forwards
    return tokens / forwards


def test_windows_and_their_tokens_per_forward():
    model, ids = fresh_model(), rows(5, 9, 3)
    # guess rows are the base model's: guesses that are right now and then
    adapter = GatedAdapter.random(model, 2, scale=1e-6)
    before, stages = digest(model), []
    found = cllm.tune(
        model, ids, adapter, sizes=(3, 6), pairs=((2, 3), (3, 6)), batch_size=2,
        progress=lambda *step: stages.append(step), **QUICK,
    )  # fmt: skip
    windows = [one.window for one in found.candidates]
    assert windows == [ONE, Window(3), Window(6), Window(3, 2), Window(6, 3)]
    assert [window.rows for window in windows] == [1, 3, 6, 5, 9]
    for one in found.candidates:
        alone = decoded(
            model, ids, config=one.window.config, adapter=adapter if one.window.gated else None
        )
        assert one.tokens_per_forward == pytest.approx(alone)
        seconds = one.seconds_per_forward
        assert 0 < seconds.low <= seconds.median <= seconds.high
        assert one.tokens_per_second == one.tokens_per_forward / seconds.median
    assert found.measured[0].window is None
    assert found.measured[0].ratio == Spread(1.0, 1.0, 1.0)
    assert ONE in {one.window for one in found.measured}
    assert {one.window.gated for one in found.measured[1:]} == {False, True}
    assert found.fastest(gated=True).gated and not found.fastest(gated=False).gated
    assert not model.training and digest(model) == before
    for stage in ("timing a forward", "counting tokens per forward", "measuring the best"):
        steps = [(done, total) for name, done, total in stages if name == stage]
        assert steps == sorted(steps) and len({total for _, total in steps}) == 1
    assert found.to_json()["candidates"][3]["verify_size"] == 2


def test_a_patched_model_and_one_in_training_mode_stay_as_they_are():
    model = fresh_model().train()
    with cllm.patched(model, cllm.JacobiConfig(block_size=4)):
        found = cllm.tune(model, rows(4), sizes=(2,), pairs=((2, 2),), **QUICK)
    # no adapter: no pairs
    assert [one.window for one in found.candidates] == [ONE, Window(2)]
    assert model.training
    with pytest.raises(ValueError, match="no window with an adapter was tried"):
        found.fastest(gated=True)


def spread(value):
    return Spread(value, value, value)


def tuning(**ratios: float) -> Tuning:
    windows = {"greedy": None, "one": ONE, "plain": Window(8), "gated": Window(8, 4)}
    measured = [Measured(windows[name], spread(9.0), spread(x)) for name, x in ratios.items()]
    return Tuning((), tuple(measured), 1, 8)


def test_the_verdict():
    best = tuning(greedy=1.0, one=1.05, plain=1.1, gated=1.4)
    assert best.best == Window(8, 4)
    line = best.line('"folder"')
    assert line == (
        'cllm.patch(model, cllm.JacobiConfig(block_size=8, verify_size=4), adapter="folder")'
    )
    assert eval(line.removeprefix("cllm.patch(model, ").split(", adapter")[0]) == best.best.config
    plain = tuning(greedy=1.0, one=0.9, plain=1.1, gated=1.05)
    assert plain.line() == "cllm.patch(model, cllm.JacobiConfig(block_size=8))"
    # HuggingFace's own is faster, or one token a forward is
    for ratios in (dict(one=0.9, plain=0.95, gated=0.99), dict(one=1.2, plain=1.1, gated=1.1)):
        lost = tuning(greedy=1.0, **ratios)
        assert lost.best is None and lost.line() is None


def test_finalists_are_the_best_products_the_best_of_each_kind_and_one():
    def candidate(window, rate, seconds):
        return Candidate(window, rate, spread(seconds))

    found = _finalists(
        [
            candidate(ONE, 1.0, 0.1),
            candidate(Window(2), 1.1, 0.2),
            candidate(Window(4), 1.2, 0.3),
            candidate(Window(4, 2), 1.5, 0.1),
            candidate(Window(4, 4), 1.8, 0.1),
            candidate(Window(8, 8), 2.0, 0.5),
        ],
        2,
    )
    assert found == [Window(4, 4), Window(4, 2), Window(2), ONE]


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert math.isclose(Spread.of([1.0, 2.0]).median, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=["text"]), "prompts that are text need the tokenizer"),
        (
            dict(prompts=[[1, 2]], sizes=(0,)),
            "block_size must be None, an integer >= 1 or 'auto', not 0",
        ),
        (dict(prompts=[[1, 2]], rounds=0), "rounds must be at least 1, not 0"),
        (dict(prompts=[[1, 2]], max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(prompts=[[1] * 5000]), "but the model's context is"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        cllm.tune(tiny_model("llama"), **(QUICK | arguments))


def test_bad_pairs_and_adapters():
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 2)
    with pytest.raises(ValueError, match="verify_size must be None or an integer from 1 to"):
        cllm.tune(model, rows(3), adapter, pairs=((4, 2),), **QUICK)
    with pytest.raises(cllm.AdapterError, match="another base"):
        cllm.tune(tiny_model("gpt2"), rows(3), adapter, **QUICK)


def test_text_with_a_tokenizer():
    found = cllm.tune(
        tiny_model("llama"), ["how many", "a dog"], tokenizer=letters_tokenizer(), sizes=(2,),
        **QUICK,
    )  # fmt: skip
    assert found.prompts == 2
