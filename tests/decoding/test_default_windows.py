"""The window where nobody names a size, and whether an adapter makes its guesses."""

from __future__ import annotations

import pytest
import torch

import cllm
from cllm import GatedAdapter
from cllm.decoding import config as config_module

from .tiny_models import prompts, tiny_model


@pytest.mark.parametrize(
    ("changes", "device", "batch", "size"),
    [
        ({}, "cpu", 1, 4),
        ({}, "cpu", 4, 2),
        ({}, "cpu", 64, 1),
        ({"mode": "block"}, "cpu", 64, 4),
        ({"record_trajectories": True}, "cpu", 64, 4),
        ({}, "cuda", 1, 16),
        ({}, "cuda", 16, 4),
        ({}, "cuda", 128, 1),
        ({"record_trajectories": True}, "cuda", 64, 16),
        ({"candidates": 2}, "cuda", 64, 2),
        ({"block_size": 7}, "cpu", 8, 7),
        ({"verify_size": 9}, "cpu", 1, 9),
        ({"verify_size": 3}, "cpu", 1, 4),
        ({"verify_size": 3, "mode": "block"}, "cuda", 1, 3),
    ],
)
def test_the_block_size_that_nobody_named(changes, device, batch, size):
    config = cllm.JacobiConfig(**changes).on(device, batch)
    assert config.width == size and config.on("cpu", 1) is config
    with pytest.raises(ValueError, match="block_size=None is no number"):
        _ = cllm.JacobiConfig().width
    with pytest.raises(ValueError, match="verify_size must be None or an integer >= 1, not 0"):
        cllm.JacobiConfig(verify_size=0)


@pytest.mark.parametrize(
    ("isa", "dot", "float32", "bfloat16"),
    [
        ("avx512", True, 6, 6),
        ("avx512", False, 6, 4),
        ("avx2", False, 6, 4),
        ("scalar", False, 4, 4),
    ],
)
def test_wider_windows_where_the_cpu_is_quick(isa, dot, float32, bfloat16, monkeypatch):
    monkeypatch.setattr(config_module, "isa", lambda: isa)
    monkeypatch.setattr(config_module, "bf16_dot", lambda: dot)
    for dtype, size in ((torch.float32, float32), (torch.bfloat16, bfloat16), (torch.float16, 4)):
        assert cllm.JacobiConfig().on("cpu", 1, dtype=dtype).width == size
        assert cllm.JacobiConfig().on("cpu", 2, dtype=dtype).width == 4
        assert cllm.JacobiConfig().on("cpu", 1, gated=True, dtype=dtype).width == 4
        assert cllm.JacobiConfig(candidates=2).on("cpu", 1, dtype=dtype).width == 4
        assert cllm.JacobiConfig().on("cuda", 1, dtype=dtype).width == 16
        model = tiny_model("llama", dtype)
        found = cllm.generate(model, **prompts([3]), max_new_tokens=8, return_dict_in_generate=True)
        assert found.block_size == size


@pytest.mark.parametrize(
    ("changes", "device", "batch", "asked"),
    [
        ({}, "cpu", 2, True),
        ({}, "cpu", 3, False),
        ({}, "cuda", 16, True),
        ({}, "cuda", 17, False),
        *(
            (changes, device, 64, True)
            for changes in (
                {"block_size": 4},
                {"block_size": "auto"},
                {"verify_size": 2},
                {"candidates": 2},
                {"mode": "block"},
                {"record_trajectories": True},
            )
            for device in ("cpu", "cuda")
        ),
    ],
)
def test_when_an_adapter_is_asked(changes, device, batch, asked):
    config = cllm.JacobiConfig(**changes)
    assert config.asks_adapter(device, batch) is asked
    if config.block_size is None:
        assert config.on(device, batch, gated=True).width >= 2


@pytest.mark.parametrize(("rows", "changes"), [(2, {}), (3, {}), (3, {"block_size": 4})])
def test_an_adapter_in_batches(rows, changes, monkeypatch):
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 4, targets="all-linear", scale=0.05, seed=0)
    asked = []
    own = GatedAdapter.applied
    monkeypatch.setattr(
        GatedAdapter, "applied", lambda self, model: asked.append(model) or own(self, model)
    )
    inputs = prompts([9, 5, 1][:rows])
    found = cllm.generate(model, **inputs, max_new_tokens=12, adapter=adapter, **changes)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert len(asked) == (1 if rows == 2 or changes else 0)


def test_an_adapter_that_is_not_asked_is_still_looked_at():
    model = tiny_model("llama")
    other = GatedAdapter.random(tiny_model("qwen3"), 4, targets="all-linear", scale=0.05, seed=0)
    with pytest.raises(cllm.AdapterError):
        cllm.generate(model, **prompts([3, 4, 5, 6]), max_new_tokens=2, adapter=other)
