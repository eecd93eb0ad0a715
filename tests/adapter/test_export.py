"""An adapter's folder to give away: whole, small, checked, free of local paths."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from cllm import GatedAdapter
from cllm.adapter import AdapterError, base_fingerprint
from cllm.adapter.card import render_card
from cllm.adapter.export import export_adapter

from ..decoding.tiny_models import tiny_model

BASE = "someone/tiny-llama"
RESULTS = {
    "gsm8k": {
        "prompts": 100,
        "tokens_per_forward": {"base": 1.09, "adapter": 1.657},
        "identical": 100,
    },
    "spider": {"prompts": 7, "tokens_per_forward": {"base": 1.2, "adapter": 2}, "identical": False},
}
RECIPE = {
    "arguments": {
        "learning_rate": 0.002,
        "lora_targets": "all-linear",
        "output_dir": "/home/someone/runs/x",
        "lora_r": 2,
    },
    "recipe": {"trajectories": ["/home/someone/trajectories"]},
    "trajectories": [{"block_size": 16, "shards": [{"rows": 1200}, {"rows": 34}]}],
}


@pytest.fixture
def trained(tmp_path):
    """As training leaves it: local paths, fp32, a recipe."""
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    adapter.metadata |= {
        "base_model": "/home/someone/models/base",
        "block_size": 16,
        "step": 1234,
        "noisy_tokens": 5678.0,
        "made_in": "/home/someone/runs",
    }
    folder = adapter.save(tmp_path / "trained")
    (folder / "cllm_recipe.json").write_text(json.dumps(RECIPE))
    return folder


def export(trained, folder, **options):
    return export_adapter(trained, folder, tiny_model("llama"), base_model=BASE, **options)


def test_whole_folder(tmp_path, trained):
    folder = export(trained, tmp_path / "out" / "tiny", verify_size=8, tasks=["gsm8k"])
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "cllm_adapter.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    metadata = json.loads((folder / "cllm_adapter.json").read_text())
    assert metadata == {
        "format": 1,
        "gated": True,
        "base_model": BASE,
        "base_fingerprint": base_fingerprint(tiny_model("llama")),
        "block_size": 16,
        "verify_size": 8,
        "tasks": ["gsm8k"],
        "step": 1234,
        "noisy_tokens": 5678.0,
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    for name in ("README.md", "adapter_config.json", "cllm_adapter.json"):
        assert "/home" not in (folder / name).read_text() and str(tmp_path) not in name
    loaded, source = GatedAdapter.load(folder), GatedAdapter.load(trained)
    loaded.check(tiny_model("llama"))
    for name, pair in source.weights.items():
        assert torch.equal(loaded.weights[name].a, pair.a.bfloat16())
        assert torch.equal(loaded.weights[name].b, pair.b.bfloat16())
    assert loaded.nbytes * 2 == source.nbytes


def test_card(tmp_path, trained):
    folder = export(trained, tmp_path / "tiny", results=RESULTS, facts={"time": "2 h"})
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == BASE
    assert "| gsm8k | 100 | 1.09 | 1.66 | 100 of 100 |" in body
    assert "| spider | 7 | 1.20 | 2.00 | not all |" in body
    assert "## Time\n2 h\n" in body and "## Hardware\nNot recorded.\n" in body
    assert "- 1,234 responses, blocks of 16 tokens" in body
    assert "5,678 tokens of noisy states, in 1,234 steps." in body
    assert "| `learning_rate` | 0.002 |" in body and "output_dir" not in body
    assert "| `lora_targets` | all-linear |" in body
    headings = re.findall(r"^## (.*)$", body, re.M)
    assert headings == [
        *("Base", "How to use", "Data", "Recipe", "Tokens", "Time", "Hardware", "Results")
    ]
    assert "\n\n\n" not in body


def test_card_makes_no_number_up():
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    adapter.metadata["base_model"] = BASE
    body = render_card(adapter, "tiny", dtype=torch.bfloat16)
    assert body.endswith("## Results\nNothing was measured.\n")
    for heading in ("Data", "Recipe", "Tokens", "Time", "Hardware"):
        assert f"## {heading}\nNot recorded.\n" in body


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"limit": 1000}, r"takes 0\.0\d+ MiB in bfloat16, more than 0\.000954 MiB; train one"),
        ({"verify_size": 17}, "verify_size 17, which is above block_size 16"),
        ({"results": {"x": {"prompts": 3}}}, "the results of x lack 'identical'"),
        ({"results": {"x": RESULTS["gsm8k"] | {"identical": 101}}}, "the results of x must be"),
        ({"results": {"x": RESULTS["gsm8k"] | {"prompts": 0}}}, "the results of x must be"),
        ({"results": []}, "must be one JSON object"),
        ({"facts": {"speed": "high"}}, "not 'speed': 'high'"),
    ],
)
def test_refused_and_nothing_left(tmp_path, trained, options, reason):
    with pytest.raises(AdapterError, match=reason):
        export(trained, tmp_path / "out" / "tiny", **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_another_base_is_refused(tmp_path, trained):
    with pytest.raises(AdapterError, match="was trained for other weights"):
        export_adapter(trained, tmp_path / "x", tiny_model("qwen2"), base_model=BASE)
    with pytest.raises(ValueError, match=r"base_model must be a hub id \(owner/name\), not '/a/b'"):
        export_adapter(trained, tmp_path / "x", tiny_model("llama"), base_model="/a/b")
    assert not (tmp_path / "x").exists()


def test_not_gated_is_refused(tmp_path, trained):
    path = trained / "cllm_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gated": False}))
    with pytest.raises(AdapterError, match="only gated adapters are exported"):
        export(trained, tmp_path / "x")


def test_too_large_for_half_precision(tmp_path):
    adapter = GatedAdapter.random(tiny_model("llama"), 2, scale=1e6)
    folder = adapter.save(tmp_path / "huge")
    with pytest.raises(AdapterError, match=r"are too large for torch\.float16"):
        export(folder, tmp_path / "x", dtype=torch.float16)
    assert not (tmp_path / "x").exists()


def test_what_is_there_is_kept(tmp_path, trained, monkeypatch):
    folder = export(trained, tmp_path / "tiny")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(AdapterError, match="is there already"):
        export(trained, folder)
    export(trained, folder, overwrite=True, tasks=["spider"])
    metadata = json.loads((folder / "cllm_adapter.json").read_text())
    assert metadata["tasks"] == ["spider"]
    assert sorted(before) == sorted(file.name for file in folder.iterdir())
    other = tmp_path / "precious"
    other.mkdir()
    with pytest.raises(AdapterError, match="is not an adapter's folder"):
        export(trained, other, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "tiny", "trained"]
