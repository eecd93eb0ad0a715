"""Captured iterations and forwards. What a capture is, the CPU tests play; a GPU's makes the last
tests."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

import cllm
from cllm.decoding import cache, graphs, layouts, prefill, shelf
from cllm.decoding.cache import BlockPlan

from ..adapter.adapters import peft_model
from .test_gated import greedy, random_adapter
from .test_processors_and_streaming import Recorder as Streamer
from .tiny_models import PAD, prompts, tiny_model
from .tokenizer import letters_tokenizer


class Recorder:
    """Stands for CUDA's graphs: what was captured runs anew, on what its inputs hold by then.

    Attributes:
        prefills: another one, for them.
    """

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, run, pool=None):
        run()  # as before a real capture, where kernels are compiled
        given = run()
        self.captures += 1

        def replay():
            self.replays += 1
            given.copy_(run())

        return given, replay


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    found.prefills = Recorder()
    monkeypatch.setattr(graphs, "capture", found.capture)
    monkeypatch.setattr(prefill, "capture", found.prefills.capture)
    monkeypatch.setattr(prefill, "new_pool", object)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    # as on a GPU: no layer of native code, and places made of lengths that are on the device
    monkeypatch.setattr(layouts, "native_devices", set())
    own = BlockPlan.start_window

    def start_window(plan, lengths, host_lengths, width, **chains):
        own(plan, lengths, host_lengths, width, **chains)
        if plan.batch == 1:
            plan.slots = lengths[0] + torch.arange(width)

    monkeypatch.setattr(BlockPlan, "start_window", start_window)
    return found


def whole(model):
    """The whole iterations that `model` keeps; None for one that could not be captured."""
    return [one for kept in shelf._kept[model].values() for one in kept.iterations.values()]


def graphed(model, inputs, **settings):
    settings = {"block_size": 6, "compile": "graph", **settings}
    return cllm.generate(model, **inputs, **settings, return_dict_in_generate=True)


CHANGES = (
    {},
    {"mode": "block"},
    {"accept": "one"},
    {"fill": "last", "lookup": 0},
    {"lookup": 0, "pool": True},
    {"pool": False},
    {"block_size": 1},
    {"candidates": 3},
    {"candidates": 2, "do_sample": True, "seed": 3, "repetition_penalty": 1.3},
    {"adapter": 0.05, "verify_size": 3},
    {"adapter": 0.05, "pool": True},
    {"adapter": 0.05, "mode": "block"},
    {"adapter": 1e30, "fill": "last"},
    {"adapter": 0.05, "candidates": 2},
    {"adapter": 1e30, "candidates": 3, "repetition_penalty": 1.3},
    {"do_sample": True, "seed": 3},
)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_text_is_the_same(family, changes, recorder):
    model = copy.deepcopy(tiny_model(family))
    changes = dict(changes)
    if "adapter" in changes:
        changes["adapter"] = random_adapter(family, changes["adapter"])
    by_iteration = not {"do_sample", "repetition_penalty"} & set(changes)  # else by the forward
    # the second call has other lengths, and the first one's leavings in every buffer
    for lengths, count, captures in (([9, 4, 12], 40, 1), ([3, 20, 1], 25, 1)):
        inputs = prompts(lengths, seed=count)
        plain = graphed(model, inputs, max_new_tokens=count, **changes, compile="off")
        if by_iteration:
            assert torch.equal(plain.sequences, greedy(model, inputs, max_new_tokens=count))
        before = recorder.replays
        found = graphed(model, inputs, max_new_tokens=count, **changes)
        assert torch.equal(found.sequences, plain.sequences)
        assert recorder.captures == captures
        assert recorder.replays - before == found.forwards
        # which forwards a row takes part in does not depend on who launches them
        assert torch.equal(found.iterations, plain.iterations)
        assert torch.equal(found.accepted, plain.accepted)
        ahead = int(by_iteration)
        assert len(whole(model)) == ahead
        assert found.forwards == plain.forwards + ahead


@pytest.mark.parametrize("settings", [{}, {"mode": "block"}, {"adapter": 0.05}], ids=str)
def test_rows_that_stop_at_different_places(settings, recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([6, 4, 2])
    if "adapter" in settings:
        settings = {"adapter": random_adapter("llama", 0.05)}
    free = greedy(model, inputs, max_new_tokens=40, eos_token_id=None)
    # more of them than one width of the buffer, then fewer again
    ids = [int(free[0, 6 + 3]), int(free[1, 6 + 11]), int(free[2, 6 + 20])]
    unused = [token for token in range(3, 97) if not bool((free == token).any())][:9]
    for stops, captures in ((ids, 1), (ids + unused, 2), (ids[:1], 2), (ids[1:], 2)):
        wanted = dict(max_new_tokens=40, eos_token_id=stops, pad_token_id=PAD)
        found = graphed(model, inputs, **wanted, **settings)
        assert torch.equal(found.sequences, greedy(model, inputs, **wanted))
        assert recorder.captures == captures
        lone = graphed(model, inputs, **wanted, **settings, compile="off")
        assert torch.equal(found.iterations, lone.iterations)


def test_a_row_alone_and_texts_of_more_columns(recorder):
    model = copy.deepcopy(tiny_model("llama"))
    for length, count, captures in ((5, 30, 1), (9, 1, 1), (1, 200, 1), (240, 10, 1), (7, 600, 2)):
        inputs = prompts([length], seed=count)
        found = graphed(model, inputs, max_new_tokens=count)
        assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=count))
        assert recorder.captures == captures


class AfterTwenty(StoppingCriteria):
    """A custom rule, which sees every prefix."""

    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20)


def test_where_the_host_has_a_say_nothing_runs_ahead(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([6])
    tokenizer = letters_tokenizer()
    free = greedy(model, inputs, max_new_tokens=40, eos_token_id=None)[0, 6:]
    text = tokenizer.decode(free)
    shared = dict(max_new_tokens=40, eos_token_id=None)
    for settings in (
        {"stop_strings": [text[17:20]], "tokenizer": tokenizer},
        {"stopping_criteria": [AfterTwenty()]},
        {"max_time": 1000.0},
    ):
        found = graphed(model, inputs, **shared, **settings)
        assert torch.equal(found.sequences, greedy(model, inputs, **shared, **settings))
        assert found.forwards == int(found.iterations.sum())
    cut = graphed(model, inputs, **shared, max_time=1e-9)
    assert cut.forwards == 1
    for count in (1, 4):
        cut = graphed(model, inputs, **shared, max_iterations=count)
        plain = graphed(model, inputs, **shared, max_iterations=count, compile="off")
        assert cut.forwards == count and torch.equal(cut.sequences, plain.sequences)
    streamer = Streamer()
    found = graphed(model, inputs, **shared, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces[1:]), free) and streamer.ended == 1
    assert found.forwards == int(found.iterations.sum())
    assert recorder.captures == len(whole(model)) == 1


@pytest.mark.parametrize("adapter", [None, 0.05])
def test_what_the_host_takes_part_in_keeps_the_forward_alone(adapter, recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    settings = {} if adapter is None else {"adapter": random_adapter("llama", adapter)}
    for changes in ({"repetition_penalty": 1.3}, {"record_trajectories": True}):
        wanted = {name: value for name, value in changes.items() if name == "repetition_penalty"}
        before = recorder.replays
        found = graphed(model, inputs, max_new_tokens=20, **changes, **settings)
        assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=20, **wanted))
        assert recorder.replays - before == found.forwards and not whole(model)
    assert recorder.captures == 1
    plain = graphed(
        model, inputs, max_new_tokens=20, record_trajectories=True, compile="off", **settings
    )
    assert found.trajectories == plain.trajectories


def test_rows_that_are_done_write_nothing(recorder):
    """Iterations beyond a text's end leave all that a call returns as it is."""
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    graphed(model, inputs, max_new_tokens=20)
    (static,) = whole(model)
    state, before = static.state, copy.deepcopy(static.state)
    assert bool(state.done.all())
    predictions = torch.randint(3, 90, (2, 6))
    state.step(predictions, cllm.JacobiConfig(block_size=6))
    for name in ("sequences", "window", "lengths", "generated", "progress", "done"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name


def test_settings_that_are_fixed_in_a_capture_are_told_apart(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    changes = [{}, {"lookup": 2}, {"lookup_least": 1}, {"accept": "one"}, {"fill": "last"}]
    changes += [{"guesses": "ordered"}, {"candidates": 1, "pool": False}, {"candidates": 2}]
    for count, change in enumerate((*changes, changes[-1]), start=1):
        found = graphed(model, inputs, max_new_tokens=20, **change)
        assert torch.equal(found.sequences, expected)
        assert recorder.captures == min(count, len(changes))
        assert len(whole(model)) == min(count, graphs.MOST_KEPT)


class HostReads(TorchDispatchMode):
    """Counts what a stream that is being captured cannot do."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # values that go to the host, and host values that become tensors
        if function._opname in ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select"):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "gated", "candidates"),
    [(mode, gated, 1) for mode in ("sliding", "block") for gated in (False, True)]
    + [("sliding", False, 3), ("sliding", True, 2), ("sliding", True, 3)],
)
def test_an_iteration_needs_no_host(gated, mode, candidates, recorder, monkeypatch):
    # which looks first on a CPU, and only there
    monkeypatch.setattr(cache, "finite_guesses", lambda states, first: states)
    reads, own = HostReads(), recorder.capture

    def watched(run):
        with reads:
            return own(run)

    monkeypatch.setattr(graphs, "capture", watched)
    settings = {"adapter": random_adapter("llama", 0.05)} if gated else {}
    settings["candidates"] = candidates
    if mode == "sliding":
        settings["pool"] = True
    model = copy.deepcopy(tiny_model("llama"))
    graphed(model, prompts([9, 4]), max_new_tokens=20, mode=mode, **settings)
    assert recorder.captures == 1 and not reads.found


def test_adapters_of_the_model_that_are_switched_off(recorder):
    model, inputs = peft_model(), prompts([9, 4])
    on = greedy(model, inputs, max_new_tokens=20)
    assert torch.equal(graphed(model, inputs, max_new_tokens=20).sequences, on)
    with model.disable_adapter():
        off = greedy(model, inputs, max_new_tokens=20)
        assert torch.equal(graphed(model, inputs, max_new_tokens=20).sequences, off)
    assert not torch.equal(on, off) and recorder.captures == 2
    assert torch.equal(graphed(model, inputs, max_new_tokens=20).sequences, on)
    assert recorder.captures == 2


def test_the_result_is_not_the_next_calls_memory(recorder):
    model = copy.deepcopy(tiny_model("llama"))
    first = graphed(model, prompts([9, 4]), max_new_tokens=20).sequences
    kept = first.clone()
    graphed(model, prompts([8, 3], seed=5), max_new_tokens=21)
    assert torch.equal(first, kept)


def test_the_states_bytes_are_counted(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    graphed(model, inputs, max_new_tokens=20)
    ((_, kept),) = shelf._kept[model].items()
    sequences, fill, pool = 2 * 512 * 8, 2 * 518 * 8, 2 * 97 * 8
    assert graphs.kept_bytes(model) >= kept.cache.nbytes + sequences + fill + pool


def test_captures_are_kept_and_bounded(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    settings = dict(block_size=6, compile="graph")
    for expected in (1, 1):
        cllm.generate(model, **inputs, max_new_tokens=20, **settings)
        assert recorder.captures == expected
    cllm.generate(model, **prompts([3, 7]), max_new_tokens=30, **settings)  # the same shape
    assert recorder.captures == 1
    bytes_of_one = graphs.kept_bytes(model)
    assert bytes_of_one > 0
    for size in range(2, 9):
        cllm.generate(model, **prompts([4] * size), max_new_tokens=4, **settings)
    assert len(shelf._kept[model]) == graphs.MOST_KEPT
    graphs.forget(model)
    assert graphs.kept_bytes(model) == 0


def test_other_weights_are_captured_anew(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, compile="graph")
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    found = cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, compile="graph")
    assert recorder.captures == 2
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))


def test_a_model_is_not_kept_alive(recorder):
    model = copy.deepcopy(tiny_model("llama"))
    cllm.generate(model, **prompts([9, 4]), max_new_tokens=8, block_size=6, compile="graph")
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    "failure", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no memory")]
)
def test_a_capture_that_fails_is_named_once(recorder, monkeypatch, failure):
    def fails(run):
        # one of its own: the parameter would keep the model by its traceback
        raise type(failure)(str(failure))

    monkeypatch.setattr(graphs, "capture", fails)
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, compile="graph")
        again = cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, compile="graph")
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))
    assert torch.equal(again, found)
    told = [str(one.message) for one in caught if "compile='graph'" in str(one.message)]
    assert len(told) == 1 and str(failure) in told[0]
    if isinstance(failure, torch.OutOfMemoryError):  # not even the cache
        assert graphs.kept_bytes(model) == 0
    else:
        assert whole(model) == [None]


def test_a_capture_that_fails_half_way_leaves_the_call_as_it_was(recorder, monkeypatch):
    def fails(run):
        run()
        raise RuntimeError("no more")

    monkeypatch.setattr(graphs, "capture", fails)
    for settings in ({}, {"adapter": random_adapter("llama", 0.05)}, {"mode": "block"}):
        model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
        plain = graphed(model, inputs, max_new_tokens=20, compile="off", **settings)
        with pytest.warns(UserWarning, match="the iteration over .* could not be captured"):
            found = graphed(model, inputs, max_new_tokens=20, **settings)
        assert torch.equal(found.sequences, plain.sequences)
        assert torch.equal(found.iterations, plain.iterations)
        assert found.forwards == plain.forwards


def test_autocast_goes_without(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        graphed(model, inputs, max_new_tokens=6)
    graphed(model, inputs, max_new_tokens=6)
    assert recorder.captures == 1


def test_inference_mode_has_buffers_of_its_own(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    with torch.inference_mode():
        assert torch.equal(graphed(model, inputs, max_new_tokens=20).sequences, expected)
    assert torch.equal(graphed(model, inputs, max_new_tokens=20).sequences, expected)


def test_a_layout_that_follows_the_text_goes_without(recorder):
    model, inputs = copy.deepcopy(tiny_model("bloom")), prompts([9, 4])
    with pytest.warns(UserWarning, match="right-aligned"):
        found = cllm.generate(model, **inputs, max_new_tokens=12, block_size=4, compile="graph")
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=12))


def test_a_call_that_fails_keeps_nothing(recorder):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cllm.generate(
            model, **inputs, max_new_tokens=8, block_size=6, compile="graph",
            logits_processor=[stop],
        )  # fmt: skip
    assert graphs.kept_bytes(model) == 0
