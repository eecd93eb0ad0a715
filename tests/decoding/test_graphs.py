"""Captured forwards. What a capture is, the CPU tests play; a GPU's makes the last test."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch

import cllm
from cllm.decoding import forward, graphs

from .test_gated import greedy, random_adapter
from .tiny_models import prompts, tiny_model


class Recorder:
    """Stands for CUDA's graphs: what was captured runs anew, on what its inputs hold by then."""

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, run):
        given = run()
        self.captures += 1

        def replay():
            self.replays += 1
            given.copy_(run())

        return given, replay


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(graphs, "capture", found.capture)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    # as on a GPU: no layer of native code, and places made of lengths that are on the device
    monkeypatch.setattr(forward, "native_devices", set())
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_text_is_the_same(family, recorder):
    model, inputs = copy.deepcopy(tiny_model(family)), prompts([9, 4, 12])
    expected = greedy(model, inputs, max_new_tokens=40)
    for changes in (
        {},
        {"mode": "block"},
        {"adapter": random_adapter(family, 0.05), "verify_size": 3},
        {"do_sample": True, "seed": 3},
    ):
        if "do_sample" in changes:
            wanted = cllm.generate(model, **inputs, max_new_tokens=40, block_size=1, **changes)
        else:
            wanted = expected
        before = recorder.captures, recorder.replays
        found = cllm.generate(
            model,
            **inputs,
            max_new_tokens=40,
            block_size=6,
            compile="graph",
            return_dict_in_generate=True,
            **changes,
        )
        assert torch.equal(found.sequences, wanted), changes
        assert recorder.captures - before[0] in (0, 1)
        assert recorder.replays - before[1] == found.forwards


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
    assert len(graphs._kept[model]) == graphs.MOST_KEPT
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
        raise failure

    monkeypatch.setattr(graphs, "capture", fails)
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, compile="graph")
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))
    told = [str(one.message) for one in caught if "compile='graph'" in str(one.message)]
    assert len(told) == 1 and str(failure) in told[0]


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


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="compile='graph' needs a CUDA device"):
        cllm.generate(tiny_model("llama"), **prompts([4]), max_new_tokens=4, compile="graph")
    with pytest.raises(ValueError, match="compile must be None or 'graph', not 'fast'"):
        cllm.JacobiConfig(compile="fast")
    with pytest.raises(ValueError, match="times forwards without a graph"):
        cllm.JacobiConfig(compile="graph", block_size="auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu(family, dtype):
    model = copy.deepcopy(tiny_model(family, dtype)).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompts([9, 4]).items()}
    for changes in ({}, {"adapter": random_adapter(family, 0.05)}):
        settings = dict(max_new_tokens=40, block_size=6, **changes)
        plain = cllm.generate(model, **inputs, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                found = cllm.generate(model, **inputs, **settings, compile="graph")
                assert torch.equal(found, plain)
