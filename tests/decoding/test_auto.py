"""`block_size="auto"`: the window with the most tokens per second, and the same text."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm.decoding import auto
from cllm.decoding.auto import GATED, PLAIN, Acceptance, timed

from .test_gated import random_adapter
from .tiny_models import fresh_model, prompts, tiny_model


def simulated(rates: list[float], size: int, forwards: int, seed: int) -> Counter:
    """What forwards commit whose guess in place j is right with probability rates[j]."""
    rng, runs = random.Random(seed), Counter()
    for _ in range(forwards):
        tokens = 1
        while tokens < size and rng.random() < rates[tokens - 1]:
            tokens += 1
        runs[tokens, False] += 1
    return runs


def test_windows_of_different_sizes_add_up():
    rates = [0.8, 0.6, 0.5, 0.3, 0.2, 0.1, 0.1]
    known = Acceptance()
    for number, size in enumerate((2, 4, 8) * 40):
        known.add(simulated(rates, size, 100, number), size)
    for size in (1, 2, 3, 5, 8):
        expected, alive = 1.0, 1.0
        for rate in rates[: size - 1]:
            alive *= rate
            expected += alive
        assert known.tokens_per_forward(size) == pytest.approx(expected, rel=0.05)


@given(
    runs=st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=300, max_size=400),
    size=st.integers(2, 8),
)
def test_a_full_window_is_counted_exactly(runs, size):
    """Where no text ends, the expectation is the mean but for the prior."""
    counted = Counter((min(tokens, size), False) for tokens, _ in runs)
    known = Acceptance()
    known.add(counted, size)
    mean = sum(tokens * times for (tokens, _), times in counted.items()) / len(runs)
    assert known.tokens_per_forward(size) == pytest.approx(mean, rel=0.03)
    assert 1 <= known.tokens_per_forward(2) <= known.tokens_per_forward(40) <= 40


def test_an_ended_text_says_nothing_of_the_guess_behind_it(monkeypatch):
    monkeypatch.setattr(auto, "_MEMORY", 1e6)  # for the prior to count for little in both
    known, cut = Acceptance(), Acceptance()
    known.add(Counter({(3, False): 100}), 8)
    cut.add(Counter({(3, False): 100, (3, True): 300}), 8)
    # two guesses right each time; the third wrong in the 100 that went on
    assert cut.tokens_per_forward(4) == pytest.approx(known.tokens_per_forward(4), rel=0.02)
    assert known.tokens_per_forward(4) == pytest.approx(3, rel=0.05)


def test_dear_widths_are_not_tried():
    asked = []

    def run(size):
        asked.append(size)
        return float(size)

    assert timed((run, (1, 2, 4, 8, 16))) == [{1: 1, 2: 2, 4: 4}]
    assert set(asked) == {1, 2, 4}
    times = iter([5.0, 9.0, 1.0, 9.0, 2.0, 3.0])
    assert timed((lambda size: next(times), (1, 2))) == [{1: 1.0, 2: 3.0}]


def test_ladders_are_timed_in_turn():
    """A machine that slows down meanwhile slows all down; each is cut off beside one row."""
    order = []

    def ladder(name, each):
        def run(size):
            order.append((name, size))
            return each * size + len(order) / 100

        return run

    plain, gated = timed((ladder("plain", 1), (1, 2)), (ladder("gated", 2), (1, 2, 4)))
    assert list(plain) == [1, 2] and list(gated) == [1, 2]
    assert order == 3 * [("plain", 1), ("plain", 2), ("gated", 1), ("gated", 2)]
    assert plain[1] == 1.01 and gated[1] == 2.03


def test_an_adapter_is_timed_beside_plain_windows_anew(costs):
    model, adapter = fresh_model("qwen3"), random_adapter("qwen3", 0.05)
    costs["plain"] = lambda size: 1.0
    chosen(model)
    costs["plain"] = lambda size: 20.0  # the machine is slower by now
    costs["gated"] = lambda size: 10.0
    assert chosen(model, adapter=adapter)[1] is not None
    assert set(next(iter(auto._known[model].seconds.values())).values()) == {20.0}


@pytest.fixture
def costs(monkeypatch):
    """Seconds of forwards that a test sets, in the place of the clock's."""
    given = {"plain": lambda size: 1.0, "gated": lambda size: 10.0}

    def instead(*ladders):
        kinds = ["plain" if next(iter(sizes)) == 1 else "gated" for _, sizes in ladders]
        return [
            {size: given[kind](size) for size in sizes}
            for kind, (_, sizes) in zip(kinds, ladders, strict=True)
        ]

    monkeypatch.setattr(auto, "timed", instead)
    return given


def chosen(model, **options):
    options = {"max_new_tokens": 48, "return_dict_in_generate": True, **options}
    out = cllm.generate(model, **prompts([9]), block_size="auto", **options)
    return out.block_size, out.verify_size


def test_wide_where_rows_are_free_and_one_where_they_are_dear(costs):
    model = fresh_model()
    assert chosen(model)[0] >= 32
    costs["plain"] = float
    assert chosen(fresh_model()) == (1, None)


def test_guesses_that_are_right_widen_the_window(costs):
    costs["plain"] = lambda size: 1 + 0.12 * size
    model = fresh_model()
    first = chosen(model, lookup=0)[0]
    assert 1 < first < 16
    known = next(iter(auto._known[model].acceptance.values()))
    known.add(Counter({(first, False): 400}), first)
    wider = chosen(model, lookup=0)[0]
    assert wider > first
    known.add(Counter({(1, False): 100_000}), wider)
    assert chosen(model, lookup=0)[0] == 1
    # nothing is learnt there, so that after some calls it is tried again
    calls = 0
    while calls < 100 and chosen(model, lookup=0, max_new_tokens=2)[0] == 1:
        calls += 1
    assert 5 < calls < 99


def test_the_adapter_is_used_where_it_pays(costs):
    model, adapter = fresh_model("qwen3"), random_adapter("qwen3", 0.05)
    costs["plain"] = lambda size: 1 + size
    assert chosen(model, adapter=adapter)[1] is None
    auto._known.clear()
    costs["gated"] = lambda size: 0.5
    size, verify = chosen(model, adapter=adapter)
    assert verify == size and size in GATED


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-alibi"])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_the_same(family, sampled):
    model, inputs = tiny_model(family), prompts([9, 4, 6])
    settings = dict(max_new_tokens=40, do_sample=sampled, seed=3)
    expected = cllm.generate(model, **inputs, block_size=1, **settings)
    for _ in range(3):
        out = cllm.generate(
            model, **inputs, block_size="auto", return_dict_in_generate=True, **settings
        )
        assert torch.equal(out.sequences, expected)
        assert out.block_size in PLAIN and out.verify_size is None


def test_it_is_measured_once(monkeypatch):
    model, measured = fresh_model(), []
    original = auto.timed
    monkeypatch.setattr(auto, "timed", lambda *args: measured.append(1) or original(*args))
    for _ in range(3):
        assert chosen(model, max_new_tokens=3)[0] <= 3  # nor again for a longer text
    chosen(model, max_new_tokens=80)
    assert len(measured) == 1
    cllm.generate(model, **prompts([9] * 3), block_size="auto", max_new_tokens=80)
    assert len(measured) == 2


def test_a_patched_model_and_recorded_windows():
    model = fresh_model()
    expected = model.generate(**prompts([9]), max_new_tokens=30)
    with cllm.patched(model, cllm.JacobiConfig(block_size="auto", record_trajectories=True)):
        out = model.generate(**prompts([9]), max_new_tokens=30, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.trajectories[0].block_size == out.block_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": "fast"}, "block_size must be None, an integer >= 1 or 'auto', not 'fast'"),
        ({"block_size": "auto", "mode": "block"}, "block_size='auto' needs mode='sliding'"),
        ({"block_size": "auto", "accept": "one"}, "block_size='auto' needs accept='all'"),
        ({"block_size": "auto", "verify_size": 2}, "block_size='auto' chooses verify_size, too"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        cllm.JacobiConfig(**settings)
    with pytest.raises(ValueError, match="no number before a call has chosen"):
        _ = cllm.JacobiConfig(block_size="auto").width
