"""Captured iterations on a GPU; test_graphs.py plays captures on a CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import cllm
from cllm.decoding import graphs

from .test_gated import greedy, random_adapter
from .test_graphs import graphed
from .tiny_models import prompts, tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu(family, dtype):
    model = copy.deepcopy(tiny_model(family, dtype)).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompts([9, 4]).items()}
    adapter = random_adapter(family, 0.05)
    every = [
        {},
        {"adapter": adapter},
        {"mode": "block"},
        {"fill": "last", "lookup": 0},
        {"adapter": adapter, "verify_size": 3, "pool": True},
        {"do_sample": True, "seed": 3},
        {"repetition_penalty": 1.3},
        {"max_iterations": 5},
        {"candidates": 3},
        {"candidates": 2, "do_sample": True, "seed": 3},
    ]
    # a graph's forward sees a longer cache, which rounds otherwise; near-ties are rare in fp32 only
    for changes in every if dtype == torch.float32 else every[:2]:
        settings = dict(max_new_tokens=40, block_size=6, return_dict_in_generate=True, **changes)
        plain = cllm.generate(model, **inputs, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                found = cllm.generate(model, **inputs, **settings, compile="graph")
                assert torch.equal(found.sequences, plain.sequences)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_lengths_share_a_capture_on_a_gpu(monkeypatch):
    captures = []
    own = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda run: captures.append(run) or own(run))
    model = copy.deepcopy(tiny_model("llama")).cuda()
    adapter = random_adapter("llama", 0.05)
    for count, (lengths, tokens) in enumerate((([9, 4], 40), ([3, 20], 25), ([1, 1], 60))):
        inputs = {name: one.cuda() for name, one in prompts(lengths, seed=count).items()}
        for settings in ({}, {"adapter": adapter}):
            found = graphed(model, inputs, max_new_tokens=tokens, **settings)
            assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=tokens))
            assert found.forwards == int(found.iterations.max()) + 1
            torch.cuda.empty_cache()  # what a capture reads and nobody holds would be gone now
            torch.full((1 << 24,), float("nan"), device="cuda")
    assert len(captures) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captures_outlive_each_other_on_a_gpu(dtype):
    """What one of them holds of cuBLAS must not go with another."""
    model = copy.deepcopy(tiny_model("llama", dtype)).cuda()
    inputs = {name: one.cuda() for name, one in prompts([9, 4]).items()}

    def text(size):
        return cllm.generate(
            model, **inputs, max_new_tokens=30, block_size=size, compile="graph"
        ).tolist()

    sizes = range(2, graphs.MOST_KEPT + 2)
    first = {size: text(size) for size in sizes}
    for rows in range(3, graphs.MOST_KEPT + 2):  # puts the oldest out, one after the other
        others = {name: one.cuda() for name, one in prompts([5] * rows).items()}
        cllm.generate(model, **others, max_new_tokens=4, block_size=3, compile="graph")
        torch.cuda.empty_cache()
        torch.full((1 << 24,), float("nan"), device="cuda")
        assert {size: text(size) for size in sizes} == first
