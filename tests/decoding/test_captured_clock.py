"""`block_size="auto"` goes by the seconds of captured forwards where calls are captured."""

from __future__ import annotations

import warnings

import pytest
import torch

import cllm
from cllm.decoding import auto, forward_clock, graphs, layouts
from cllm.decoding.forward_clock import ForwardClock

from .test_automatic_graphs import called, fresh, played  # noqa: F401, a fixture
from .test_gated import greedy, random_adapter
from .test_graphs import recorder  # noqa: F401, a fixture
from .tiny_models import prompts, tiny_model


def test_an_automatic_window_goes_by_captured_forwards(played, monkeypatch):  # noqa: F811
    timed = []

    def instead(ladder):
        run, sizes = ladder
        timed.append(sizes)
        run(sizes[1])
        return [{size: 1 + 0.01 * size for size in sizes}]

    monkeypatch.setattr(auto, "timed", instead)
    model, inputs = fresh(), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    settings = {"block_size": "auto"}
    called(model, inputs, compile="off", **settings)
    assert played.captures == 0 and len(timed) == 1
    auto._known[model].acceptance.clear()  # or the next call would know more
    found = called(model, inputs, **settings)
    assert played.captures == 1 and len(timed) == 2  # the clock's own
    (off, on) = auto._known[model].seconds
    assert off[:3] == on[:3] and (off[3], on[3]) == (False, True)
    width = found.block_size
    auto._known[model].acceptance.clear()
    found = called(model, inputs, **settings)
    assert found.block_size == width and torch.equal(found.sequences, expected)
    assert played.captures == 2 and len(timed) == 2
    # asked for: the same seconds
    auto._known[model].acceptance.clear()
    found = called(model, inputs, compile="graph", **settings)
    assert played.captures == 2 and len(timed) == 2
    assert torch.equal(found.sequences, expected)
    # a recorded call gets no graph
    called(model, inputs, record_trajectories=True, **settings)
    assert played.captures == 2 and len(timed) == 2


@pytest.mark.parametrize("compile", ["off", None, "graph"])
def test_a_clock_captures_before_it_counts(compile, played, monkeypatch):  # noqa: F811
    """Every width once, the adapter's as well; a width is timed by replays alone."""
    monkeypatch.setattr(layouts, "native_devices", {"cpu"})
    seconds = iter(range(1000))

    def now():
        seen.append(played.captures)
        return float(next(seconds))

    seen = []
    model, adapter = fresh(), random_adapter("llama", 0.05)
    clock = ForwardClock(model, [5, 6, 7], 16, adapter, compile=compile)
    monkeypatch.setattr(forward_clock.time, "perf_counter", now)
    for _ in range(2):
        assert clock.plain(3, 2) == 0.5
        assert clock.gated(2, 4, 1) == 1.0
        assert clock.gated(2, 4, 1, adapter=False) == 1.0
    assert seen[::2] == seen[1::2]
    assert played.captures == (0 if compile == "off" else 2)
    assert played.replays == (0 if compile == "off" else 2 * (3 + 2))
    assert graphs.kept_bytes(model) == 0


def test_a_clock_that_cannot_capture_goes_on(played, monkeypatch):  # noqa: F811
    def fails(run):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(graphs, "capture", fails)
    model = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ForwardClock(model, [5, 6, 7], 16, compile=None).plain(3, 2) > 0


@pytest.mark.parametrize("block_size", [4, "auto"])
def test_without_a_gpu_a_graph_is_refused(block_size):
    with pytest.raises(ValueError, match="compile='graph' needs a CUDA device"):
        cllm.generate(
            tiny_model("llama"),
            **prompts([4]),
            max_new_tokens=4,
            compile="graph",
            block_size=block_size,
        )
    with pytest.raises(ValueError, match=r"compile must be None .*'inductor' or 'off', not 'fast'"):
        cllm.JacobiConfig(compile="fast")
