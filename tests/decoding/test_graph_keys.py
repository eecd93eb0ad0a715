"""What makes a captured iteration another one: everything that is baked into it."""

from __future__ import annotations

import copy
import gc
import weakref

import torch

import cllm
from cllm.decoding import graphs, shelf

from .test_gated import greedy, random_adapter
from .test_graphs import recorder  # noqa: F401, a fixture
from .tiny_models import prompts, tiny_model

SETTINGS = {"max_new_tokens": 20, "block_size": 6, "compile": "graph"}


def test_a_hook_that_comes_later_is_heard(recorder):  # noqa: F811
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    cllm.generate(model, **inputs, **SETTINGS)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *call: -call[-1])
    found = cllm.generate(model, **inputs, **SETTINGS)
    assert recorder.captures == 2
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))
    hook.remove()
    found = cllm.generate(model, **inputs, **SETTINGS)
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))


def test_an_adapters_weights_are_read_as_they_are(recorder):  # noqa: F811
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    adapter = random_adapter("llama", 0.05)
    for captures in (1, 1):
        cllm.generate(model, **inputs, **SETTINGS, adapter=adapter)
        assert recorder.captures == captures
    # the same tensors in another adapter are no other adapter
    cllm.generate(model, **inputs, **SETTINGS, adapter=copy.copy(adapter))
    assert recorder.captures == 1
    next(iter(adapter.weights.values())).b.mul_(2)
    found = cllm.generate(model, **inputs, **SETTINGS, adapter=adapter)
    assert recorder.captures == 2
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))


def test_what_a_capture_holds_goes_with_it(recorder):  # noqa: F811
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    adapter = random_adapter("llama", 0.05)
    cllm.generate(model, **inputs, **SETTINGS, adapter=adapter)
    (kept,) = shelf._kept[model].values()
    (iteration,) = kept.iterations.values()
    watched = weakref.ref(iteration)
    del kept, iteration
    for size in range(2, graphs.MOST_KEPT + 2):
        cllm.generate(model, **inputs, **{**SETTINGS, "block_size": size}, adapter=adapter)
    gc.collect()
    assert watched() is None
