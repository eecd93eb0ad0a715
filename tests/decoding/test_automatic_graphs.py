"""Graphs that nobody asked for: who gets one, and that nobody feels it. Captures are played on a
CPU, as in test_graphs.py."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from cllm.decoding import automatic, forward, graphs, layouts, shelf
from cllm.decoding.host_needs import NoHost
from cllm_kernels.block_attention import OP

from .test_gated import greedy, random_adapter
from .test_graphs import graphed, recorder  # noqa: F401, a fixture
from .test_processors_and_streaming import Recorder as Streamer
from .tiny_models import prompts, tiny_model

MANY = 1 << 40


@pytest.fixture
def played(recorder, monkeypatch):  # noqa: F811
    """A CPU as a GPU with much memory, on which block attention is the layout."""
    if OP.choose(torch.device("cpu"), "auto") == "reference":
        pytest.skip("the C++ kernels were not built")
    monkeypatch.setattr(layouts, "block_attention_devices", {"cpu"})
    monkeypatch.setattr(automatic, "_device_bytes", lambda device: MANY)
    return recorder


def fresh(family="llama"):
    return copy.deepcopy(tiny_model(family))


def called(model, inputs, **settings):
    settings = {"max_new_tokens": 20, "compile": None, **settings}
    return graphed(model, inputs, **settings)


CHANGES = (
    {},
    {"mode": "block"},
    {"candidates": 3, "adapter": None},
    {"lookup": 0, "pool": True},
    {"do_sample": True, "seed": 3},
    {"repetition_penalty": 1.3},
    {"max_time": 1000.0},
)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_from_the_second_call_of_a_shape_on(family, changes, played):
    model, inputs = fresh(family), prompts([9, 4])
    plain = called(model, inputs, compile="off", **changes).sequences
    # under the masks that several candidates need, a cache of full size costs time
    many = 0 if "candidates" in changes else 1
    for captures in (0, many, many):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = called(model, inputs, **changes)
        assert torch.equal(found.sequences, plain)
        assert played.captures == captures
    replays = played.replays
    called(model, prompts([3, 7], seed=5), **changes)  # the same shape
    assert played.captures == many and (played.replays > replays) == bool(many)
    for other in ({"block_size": 5}, {"lookup": 0, "pool": False}, {"accept": "one"}):
        called(model, inputs, **{**changes, **other})
    called(model, prompts([3, 7, 1]), **changes)
    assert played.captures == many
    called(model, prompts([3, 7, 1]), **changes)
    assert played.captures == 2 * many


def test_native_layers_and_their_adapters(played, monkeypatch):
    monkeypatch.setattr(layouts, "native_devices", {"cpu"})
    model, inputs = fresh(), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    adapter = {"adapter": random_adapter("llama", 0.05)}
    for settings in (adapter, {"candidates": 2}, {**adapter, "candidates": 2}):
        before = played.captures
        for captures in (0, 1, 1):
            found = called(model, inputs, **settings)
            assert torch.equal(found.sequences, expected)
            assert played.captures == before + captures


def test_a_streamer_may_have_one(played):
    model, inputs = fresh(), prompts([6])
    free = greedy(model, inputs, max_new_tokens=20)[0, 6:]
    for captures in (0, 1, 1):
        streamer = Streamer()
        called(model, inputs, streamer=streamer)
        assert torch.equal(torch.cat(streamer.pieces[1:]), free)
        assert played.captures == captures


def test_off_and_a_cpu_have_none(played, monkeypatch):
    model, inputs = fresh(), prompts([9, 4])
    for _ in range(3):
        called(model, inputs, compile="off")
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            called(model, inputs)
    assert played.captures == 0 and model not in automatic._calls


def test_all_calls_of_a_shape_have_a_cache_of_one_size(played, monkeypatch):
    """Attention's sums are cut by it, which 16 bits would show."""
    sizes, own = [], forward.BlockForward.__init__

    def init(self, *args, **others):
        own(self, *args, **others)
        sizes.append(self.plan.capacity)

    model, inputs = fresh(), prompts([9, 4])
    called(model, inputs, compile="off")  # the layout is found
    monkeypatch.setattr(forward.BlockForward, "__init__", init)
    called(model, inputs)
    called(model, inputs)
    called(model, inputs, compile="off")
    assert sizes[0] == sizes[1] == 512 and sizes[2] < 512


def _hooked(model):
    return model.model.layers[1].mlp.register_forward_hook(lambda *call: None).remove


def _looked_at_before(model):
    return model.lm_head.register_forward_pre_hook(lambda *call: None).remove


def _hooked_everywhere(model):
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *call: None)
    return hook.remove


def _looked_at_before_everywhere(model):
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *call: None)
    return hook.remove


def _of_another_forward(model):
    mlp = model.model.layers[0].mlp
    own = mlp.forward

    @functools.wraps(own)
    def instead(*args):
        return own(*args)

    mlp.forward = instead
    return lambda: delattr(mlp, "forward")


@pytest.mark.parametrize(
    "watch",
    [
        _hooked,
        _looked_at_before,
        _hooked_everywhere,
        _looked_at_before_everywhere,
        _of_another_forward,
    ],
)
def test_who_watches_a_model_sees_all_of_it(watch, played):
    model, inputs = fresh(), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    stop = watch(model)
    try:
        for _ in range(3):
            assert torch.equal(called(model, inputs).sequences, expected)
        assert played.captures == 0
    finally:
        stop()
    called(model, inputs)
    called(model, inputs)
    assert played.captures == 1
    stop = watch(model)
    try:
        replays = played.replays
        called(model, inputs)
        assert played.replays == replays
    finally:
        stop()


def test_hooks_that_transformers_leaves_are_nobodys(played):
    model, inputs = fresh(), prompts([9, 4])
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    called(model, inputs)
    called(model, inputs)
    assert played.captures == 1


def test_what_else_goes_without(played):
    inputs = prompts([9, 4])
    for model, settings in (
        (fresh("bloom"), {}),  # right-aligned
        (fresh(), {"record_trajectories": True}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                called(model, inputs, **settings)
        assert model not in automatic._calls
    model = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            called(model, inputs, max_new_tokens=6)
    assert played.captures == 0 and model not in automatic._calls
    parts = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    spread = SimpleNamespace(parameters=lambda: parts)
    assert "not all" in automatic.obstacle(spread, torch.device("cpu"))


def test_a_failure_is_quiet_and_not_run_into_again(played, monkeypatch, caplog):
    tried = []

    def fails(run):
        tried.append(run())
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(graphs, "capture", fails)
    model, inputs = fresh(), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "cllm"):
        warnings.simplefilter("error")
        for count in (0, 1, 1, 1):
            assert torch.equal(called(model, inputs).sequences, expected)
            assert len(tried) == count
    told = [one.getMessage() for one in caplog.records if one.name == "cllm"]
    assert len(told) == 1 and "operation not permitted" in told[0]
    assert graphs.kept_bytes(model) == 0
    called(model, inputs, block_size=5)
    called(model, inputs, block_size=5)
    assert len(tried) == 2  # another shape
    with pytest.warns(UserWarning, match="operation not permitted"):  # who asks hears of it
        called(model, inputs, compile="graph")
    assert len(tried) == 3
    graphs.forget(model)
    called(model, inputs)
    assert len(tried) == 4


def test_what_needs_the_host_is_not_captured(played, monkeypatch, caplog):
    model, inputs = fresh(), prompts([9, 4])
    own = forward.BlockForward._logits

    def reads(self, tokens, positions, masks):
        given = own(self, tokens, positions, masks)
        return given if float(given.sum()) else given * 2

    monkeypatch.setattr(forward.BlockForward, "_logits", reads)
    expected = greedy(model, inputs, max_new_tokens=20)
    with caplog.at_level(logging.INFO, "cllm"):
        for _ in range(3):
            assert torch.equal(called(model, inputs).sequences, expected)
    assert played.captures == 0
    assert sum("needs the host" in one.getMessage() for one in caplog.records) == 1


def test_operations_that_need_the_host():
    x = torch.arange(4.0)
    for run in (
        lambda: x[x > 1],
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: x.long().bincount(),
        lambda: x.repeat_interleave(torch.tensor([1, 2, 0, 1])),
        lambda: x.to("meta"),
    ):
        with pytest.raises(RuntimeError, match="needs the host"), NoHost():
            run()
    with NoHost():
        x[torch.tensor([1, 2])].index_put_((torch.tensor([0]),), x[0]).to(torch.float64)
        torch.where(x > 1, x, 0).copy_(x)


@pytest.mark.parametrize("compile", [None, "graph"])
def test_out_of_memory_lets_go_and_goes_on(compile, played, monkeypatch):
    model, inputs = fresh(), prompts([9, 4])
    other = prompts([9, 4, 2])
    expected = greedy(model, inputs, max_new_tokens=20)
    called(model, other, compile="graph")
    assert graphs.kept_bytes(model) > 0
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))

    def short(run):
        run()
        try:
            raise torch.OutOfMemoryError("no memory")
        except torch.OutOfMemoryError:
            # what ends a capture may fail behind it
            raise RuntimeError("the capture was broken off")  # noqa: B904

    monkeypatch.setattr(graphs, "capture", short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = called(model, inputs, compile=compile)
            assert torch.equal(found.sequences, expected)
    told = [one for one in caught if "compile='graph'" in str(one.message)]
    assert len(told) == (compile == "graph")
    assert len(emptied) == 1 and graphs.kept_bytes(model) == 0


def test_a_prompt_that_finds_no_memory_gets_that_of_captures(played, monkeypatch):
    model, inputs, other = fresh(), prompts([9, 4]), prompts([9, 4, 2])
    called(model, inputs, compile="graph")
    own = forward.BlockForward.prefill

    def prefill(self, *args):
        if graphs.kept_bytes(model):
            raise torch.OutOfMemoryError("no memory")
        own(self, *args)

    monkeypatch.setattr(forward.BlockForward, "prefill", prefill)
    expected = greedy(model, other, max_new_tokens=20)
    for compile in ("off", None):
        assert torch.equal(called(model, other, compile=compile).sequences, expected)
    assert graphs.kept_bytes(model) == 0

    def none_at_all(self, *args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(forward.BlockForward, "prefill", none_at_all)
    with pytest.raises(torch.OutOfMemoryError):
        called(model, other)


def test_caches_have_a_bound(played, monkeypatch):
    gc.collect()  # the models of other tests, whose captures count
    model = fresh()
    one = prompts([9])
    expected = greedy(model, one, max_new_tokens=20)
    called(model, one)
    called(model, one)
    assert played.captures == 1
    (kept,) = shelf._kept[model].values()
    share = automatic.CACHE_SHARE
    assert automatic._cache_bytes(model, 512) == kept.cache.nbytes
    # one of a single row, and none of two beside it
    room = [kept.nbytes + kept.cache.nbytes]
    monkeypatch.setattr(automatic, "_device_bytes", lambda device: share * room[0])
    for _ in range(2):  # which takes turns with the first
        called(model, prompts([9, 4]))
        assert torch.equal(called(model, one).sequences, expected)
    assert played.captures == 1
    # comes again while the other does not
    called(model, prompts([9, 4]))
    called(model, prompts([9, 4]))
    assert played.captures == 2
    (kept,) = shelf._kept[model].values()
    assert kept.plan.batch == 2
    # other models count as well
    fellow = fresh("gemma2")
    for _ in range(3):
        called(fellow, prompts([9, 4]))
    assert played.captures == 2
    # more than there is: neither a graph nor a cache of full size
    room[0] = 1
    for _ in range(3):
        called(model, prompts([9, 4, 3]))
    assert played.captures == 2


def test_shapes_that_take_turns_do_not_push_each_other_out(played):
    model = fresh()
    sizes = range(1, graphs.MOST_KEPT + 3)
    for _ in range(4):
        for size in sizes:
            called(model, prompts([4] * size), max_new_tokens=4)
    assert played.captures == graphs.MOST_KEPT
    for _ in range(4):
        for size in sizes:
            called(model, prompts([4]), max_new_tokens=4, block_size=2 + size)
    # the first of these puts nothing out, and the others go to its forward
    assert played.captures <= 2 * graphs.MOST_KEPT


def test_few_shapes_are_remembered(played):
    model = fresh()
    for size in range(automatic.MOST_SHAPES + 5):
        automatic._note(model, (size, ()))
    assert len(automatic._calls[model]) == automatic.MOST_SHAPES
    assert automatic._note(model, (0, ())) is None
    assert automatic._note(model, (size, ())) is not None
