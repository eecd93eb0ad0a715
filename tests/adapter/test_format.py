"""Adapters on disk: PEFT's folder, read and written without PEFT."""

from __future__ import annotations

import json

import pytest
import torch

from cllm import GatedAdapter
from cllm.adapter import base_fingerprint

from ..decoding.tiny_models import fresh_model, prompts, tiny_model
from .adapters import peft_model, scaled


def same(left: GatedAdapter, right: GatedAdapter) -> bool:
    return left.weights.keys() == right.weights.keys() and all(
        torch.equal(pair.a, right.weights[name].a)
        and torch.equal(pair.b, right.weights[name].b)
        and pair.scaling == pytest.approx(right.weights[name].scaling, rel=1e-12)
        for name, pair in left.weights.items()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "some targets"],
)
def test_reads_what_peft_writes(tmp_path, settings):
    peft = peft_model(**settings)
    peft.save_pretrained(tmp_path)
    assert same(GatedAdapter.load(tmp_path), GatedAdapter.from_peft(peft))


def test_written_and_read_again(tmp_path):
    adapter = scaled(GatedAdapter.random(tiny_model("llama"), 4), 1 / 3)
    adapter.metadata["block_size"] = 16
    found = GatedAdapter.load(adapter.save(tmp_path / "new" / "folder"))
    assert same(found, adapter)
    assert found.metadata == {"format": 1, **adapter.metadata}
    assert found.metadata["gated"] is True
    assert (found.parameters, found.ranks) == (adapter.parameters, (4,))


def test_peft_reads_what_is_written(tmp_path):
    from peft import PeftModel

    source = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 7})
    GatedAdapter.from_peft(source).save(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_model(), tmp_path).eval()
    ids = prompts([7])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, source(input_ids=ids).logits, rtol=1e-6, atol=1e-6
        )


def test_half_the_bytes_in_bfloat16(tmp_path):
    adapter = GatedAdapter.random(tiny_model("llama"), 8)
    sizes = [
        (adapter.save(tmp_path / str(dtype), dtype=dtype) / "adapter_model.safetensors")
        .stat()
        .st_size
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes[1] < 0.75 * sizes[0]  # the header stays
    found = GatedAdapter.load(tmp_path / str(torch.bfloat16))
    assert all(pair.a.dtype == torch.bfloat16 for pair in found.weights.values())
    assert all(
        torch.equal(pair.a, adapter.weights[name].a.bfloat16())
        for name, pair in found.weights.items()
    )


def test_random_is_reproducible_and_says_what_it_is():
    model = tiny_model("llama")
    one, same_seed, other = (GatedAdapter.random(model, 3, seed=seed) for seed in (1, 1, 2))
    assert same(one, same_seed)
    assert not same(one, other)
    assert repr(one) == "GatedAdapter(21 modules, rank 3, 4176 parameters)"
    attention = GatedAdapter.random(model, 3, targets=("q_proj", "v_proj"))
    assert set(attention.weights) == {
        f"model.layers.{layer}.self_attn.{name}"
        for layer in range(3)
        for name in ("q_proj", "v_proj")
    }


def test_the_base_is_known_again_through_dtypes_and_peft():
    model = fresh_model()
    expected = base_fingerprint(model)
    assert len(expected) == 64
    assert base_fingerprint(peft_model()) == expected
    assert base_fingerprint(fresh_model().bfloat16()) == expected
    assert base_fingerprint(fresh_model().bfloat16().float()) == expected
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] *= 1.1
    assert base_fingerprint(model) != expected


def test_other_names_or_shapes_are_another_base():
    found = {base_fingerprint(tiny_model(family)) for family in ("llama", "qwen2", "qwen3")}
    assert len(found) == 3


def test_metadata_is_plain_json(tmp_path):
    GatedAdapter.random(tiny_model("llama"), 2).save(tmp_path)
    metadata = json.loads((tmp_path / "cllm_adapter.json").read_text())
    assert metadata["gated"] is True
    assert metadata["base_fingerprint"] == base_fingerprint(tiny_model("llama"))
