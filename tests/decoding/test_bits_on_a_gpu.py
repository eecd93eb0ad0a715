"""On a GPU, in 16 bits: models with native layers write one text, however it is decoded."""

from __future__ import annotations

import copy

import pytest
import torch

import cllm

from .test_gated import random_adapter
from .tiny_models import prompts, tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_one_text_in_16_bits(family, dtype):
    model = copy.deepcopy(tiny_model(family, dtype)).cuda()
    adapter = random_adapter(family, 0.05)
    for seed in range(3):
        inputs = {name: one.cuda() for name, one in prompts([9, 4, 17], seed=seed).items()}

        def text(inputs=inputs, **changes):
            out = cllm.generate(model, **inputs, max_new_tokens=60, **changes)
            return out[:, inputs["input_ids"].shape[1] :]

        for compile in ("off", "graph"):
            expected = text(block_size=1, compile=compile)
            for size in (2, 5, 8, 16):
                for changes in ({}, {"mode": "block"}, {"pool": False, "lookup": 0}):
                    found = text(block_size=size, compile=compile, **changes)
                    assert torch.equal(found, expected), (compile, size, changes)
            for size in (3, 8):
                found = text(block_size=size, compile=compile, adapter=adapter)
                assert torch.equal(found, expected), (compile, size, "adapter")
            for changes in ({}, {"adapter": adapter}):
                found = text(block_size=4, compile=compile, candidates=3, **changes)
                assert torch.equal(found, expected), (compile, "candidates", changes)
