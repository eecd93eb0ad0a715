"""What models keep of captures: failures beside good ones, calls that overlap, bounds. Captures are
played on a CPU, as in test_graphs.py."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import cllm
from cllm import tuning
from cllm.decoding import automatic, forward_clock, graphs, shelf
from cllm.decoding.graph_key import watched
from cllm.decoding.host_needs import _needs_host

from .test_automatic_graphs import called, fresh, played  # noqa: F401, a fixture
from .test_gated import greedy
from .test_graphs import HostReads, recorder  # noqa: F401, a fixture
from .test_processors_and_streaming import Recorder as Streamer
from .tiny_models import prompts

WINDOWS = {"do_sample": True, "seed": 3}  # captured by the window


def failing(monkeypatch, with_what):
    tried = []

    def fails(run):
        tried.append(run())
        raise with_what

    monkeypatch.setattr(graphs, "capture", fails)
    return tried


@pytest.mark.parametrize("settings", [{}, WINDOWS], ids=["iterations", "windows"])
def test_who_asks_hears_of_a_failure_beside_a_good_capture(settings, played, monkeypatch):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    called(model, inputs, **settings)
    called(model, inputs, **settings)
    assert played.captures == 1
    other = {**settings, "block_size": 5}
    expected = called(model, inputs, **other).sequences
    with monkeypatch.context() as patch:
        tried = failing(patch, RuntimeError("operation not permitted"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                assert torch.equal(called(model, inputs, **other).sequences, expected)
        assert len(tried) == 1 and graphs.kept_bytes(model) > 0
        with pytest.warns(UserWarning, match="operation not permitted"):
            called(model, inputs, compile="graph", **other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            called(model, inputs, compile="graph", **other)  # named once
        assert len(tried) == 2
    replays = played.replays
    called(model, inputs, **settings)
    assert played.replays > replays


class Nested(Streamer):
    """Starts another call when the first tokens come."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def put(self, value):
        super().put(value)
        if self.call is not None:
            call, self.call = self.call, None
            self.found = call()


def test_calls_that_overlap_share_no_capture_and_make_none(played, monkeypatch):  # noqa: F811
    model, inputs, other = fresh(), prompts([6]), prompts([6, 3])
    expected = [greedy(model, ids, max_new_tokens=20) for ids in (inputs, other)]
    called(model, inputs)
    outer = Nested(lambda: called(model, inputs).sequences)
    assert torch.equal(called(model, inputs, streamer=outer).sequences, expected[0])
    assert torch.equal(outer.found, expected[0]) and played.captures == 1
    # so it is beside a capture that is there
    replays = played.replays
    outer = Nested(lambda: (called(model, inputs), played.replays))
    called(model, inputs, streamer=outer)
    assert outer.found[1] == replays and played.replays > replays
    # who asks gets one
    called(model, inputs, streamer=Nested(lambda: called(model, inputs, compile="graph")))
    assert played.captures == 2
    # what is in use takes room
    gc.collect()  # and so do the models of other tests
    called(model, other)
    room = automatic._cache_bytes(model, 2 * 512) * 5 // 4
    monkeypatch.setattr(automatic, "_device_bytes", lambda device: automatic.CACHE_SHARE * room)
    outer = Nested(lambda: called(model, other).sequences)
    called(model, inputs, streamer=outer)
    assert torch.equal(outer.found, expected[1]) and played.captures == 2
    assert not shelf._in_use[model]


def test_a_call_that_fails_is_in_use_no_more(played):  # noqa: F811
    model, inputs = fresh(), prompts([6])

    def stop():
        raise KeyboardInterrupt

    called(model, inputs)
    with pytest.raises(KeyboardInterrupt):
        called(model, inputs, streamer=Nested(stop))
    assert not shelf._in_use[model]
    called(model, inputs)
    assert played.captures == 1


def test_windows_have_a_bound_of_their_own(played):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    for size in range(2, graphs.MOST_KEPT + 4):
        called(model, inputs, compile="graph", block_size=size, **WINDOWS)
    (kept,) = shelf._kept[model].values()
    assert [key[1] for key in kept.windows] == [4, 5, 6, 7]
    assert not kept.iterations
    given = sum(one.given.nbytes for one in kept.windows.values())
    assert kept.nbytes > kept.cache.nbytes + given > kept.cache.nbytes
    # neither kind is weighed against the other's places
    for captures in (6, 7, 7):
        called(model, inputs, block_size=6)
        assert played.captures == captures


def test_iterations_leave_room_for_windows(played):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    called(model, inputs, repetition_penalty=1.3)
    for size in range(2, graphs.MOST_KEPT + 2):
        called(model, inputs, compile="graph", block_size=size)
    assert played.captures == graphs.MOST_KEPT
    called(model, inputs, repetition_penalty=1.3)
    assert played.captures == graphs.MOST_KEPT + 1
    (kept,) = shelf._kept[model].values()
    assert len(kept.iterations) == graphs.MOST_KEPT and len(kept.windows) == 1


def test_recorded_trajectories_have_the_key_of_a_window(played):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    called(model, inputs, compile="graph", record_trajectories=True)
    (kind, _) = next(iter(automatic._calls[model]))[1]
    assert kind == "window" and played.captures == 1
    # no such call of whole iterations came before
    called(model, inputs)
    assert played.captures == 1
    called(model, inputs, repetition_penalty=1.3)
    assert played.captures == 1 and played.replays > 0


def test_a_refused_streamer_puts_nothing_out(played):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    called(model, inputs, compile="graph")
    kept = graphs.kept_bytes(model)
    with pytest.raises(ValueError, match="a streamer for 2 rows: it takes a batch of 1"):
        called(model, inputs, compile="graph", streamer=Streamer())
    assert graphs.kept_bytes(model) == kept > 0


class Looking(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_who_counts_operations_sees_all_of_them(played):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    for mode in (HostReads(), Looking()):
        with mode:
            for _ in range(2):
                called(model, inputs)
            assert watched(model)
    assert played.captures == 0
    with torch.device("cpu"):  # as a default device
        assert not watched(model)


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyError, IndexError, Unforeseen])
def test_other_failures_of_a_capture(kind, played, monkeypatch):  # noqa: F811
    model, inputs = fresh(), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    if kind is Unforeseen:  # as Triton's, which come from Exception
        triton = SimpleNamespace(TritonError=Unforeseen)
        monkeypatch.setitem(graphs.sys.modules, "triton.errors", triton)
    failing(monkeypatch, kind("out of resources"))
    with pytest.warns(UserWarning, match="out of resources"):
        found = called(model, inputs, compile="graph")
    assert torch.equal(found.sequences, expected)


def test_operations_that_are_called_by_keywords():
    x, places = torch.arange(4.0), torch.tensor([1, 2])
    assert not _needs_host("index", (), {"self": x, "indices": [places]})
    assert _needs_host("index_put_", (x,), {"indices": [x > 1], "values": x})
    assert not _needs_host("copy_", (x,), {"src": x})
    assert _needs_host("_to_copy", (), {"self": x, "device": "meta"})


def test_a_clocks_widths_take_turns_without_a_bound(played):  # noqa: F811
    clock = forward_clock.ForwardClock(fresh(), [5, 6, 7], 16, compile="graph")
    sizes = range(1, graphs.MOST_KEPT + 3)
    for _ in range(2):
        for size in sizes:
            clock.plain(size, 1)
    assert played.captures == len(sizes)


def test_tuning_counts_no_capture(played, monkeypatch):  # noqa: F811
    model = fresh()
    counted, own = [], tuning._Decoder.tokens_per_second

    def watch(self, *arguments):
        before = played.captures
        rate = own(self, *arguments)
        counted.append(played.captures - before)
        return rate

    monkeypatch.setattr(tuning._Decoder, "tokens_per_second", watch)
    cllm.tune(model, [[5, 6, 7]], max_new_tokens=32, sizes=(1, 4), rounds=1, forwards=1, repeats=1)
    assert played.captures > 0 and counted and not any(counted)
