"""``cllm tune``: the table, the line to paste, JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from cllm import GatedAdapter, tuning
from cllm.cli import main
from tests.one_thread import one_thread

from .harness import PROMPTS, write_prompts

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    """Fewer windows: what is tried is not what is tested here."""
    for name, value in (("sizes", (2, 4)), ("pairs", ((2, 4),)), ("rounds", 2), ("repeats", 1)):
        monkeypatch.setitem(tuning.tune.__wrapped__.__kwdefaults__, name, value)


@pytest.fixture
def arguments(model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "few.jsonl", PROMPTS[:3])
    return (
        *("tune", "--model", model_folder, "--prompts", prompts, "--limit", 2),
        *("--max-new-tokens", 8, "--device", "cpu"),
    )


@pytest.fixture
def adapter(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return GatedAdapter.random(model, 2).save(tmp_path / "adapter")


def test_json(run, arguments, adapter):
    result = run(*arguments, "--adapter", adapter, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    windows = [(one["block_size"], one["verify_size"]) for one in found["candidates"]]
    assert windows == [(1, None), (2, None), (4, None), (4, 2)]
    assert found["prompts"] == 2 and found["max_new_tokens"] == 8
    assert found["adapter"] == str(adapter) and found["dtype"] == "float32"
    assert found["measured"][0]["window"] is None
    best = max(found["measured"], key=lambda one: one["ratio_to_huggingface"]["median"])["window"]
    if best is None or best["block_size"] == 1:
        assert found["best"] is None and found["line"] is None
    else:
        assert found["best"] == best
        assert f"block_size={best['block_size']}" in found["line"]


@pytest.mark.parametrize("best", [tuning.Window(4, 2), None])
def test_table(run, arguments, adapter, best, monkeypatch):
    monkeypatch.setattr(tuning.Tuning, "best", property(lambda self: best))
    result = run(*arguments, "--adapter", adapter)
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if line.strip()]
    marked = [line for line in lines if line.lstrip().startswith("*")]
    assert "HuggingFace greedy" in result.out
    if best is None:
        assert marked == []
        assert lines[-1].startswith("nothing beats one token per forward (n = 1, or")
    else:
        assert len(marked) == 1 and "n = 4, v = 2" in marked[0]
        assert lines[-1] == (
            "cllm.patch(model, cllm.JacobiConfig(block_size=4, verify_size=2), "
            f'adapter="{adapter}")'
        )


def test_not_trained_with_the_gate_is_said(run, arguments, adapter):
    metadata = adapter / "cllm_adapter.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"gated": False}))
    assert "does not say that it was trained" in run(*arguments, "--adapter", adapter).err


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("--prompt", "x"), "--prompt or --prompts, not both"),
        (("--adapter", "nowhere"), "neither a folder nor a hub id"),
        (("--limit", 0), "--limit"),
        (("--max-new-tokens", 0), "--max-new-tokens"),
        (("--device", "toaster"), "device 'toaster' is not known"),
        (("--model", "./nowhere"), "there is no model folder ./nowhere"),
        (("--prompts", "missing.jsonl"), "missing.jsonl: No such file"),
        (("--bogus",), "--bogus"),
    ],
)
def test_bad_input(run, arguments, extra, expected):
    result = run(*arguments, *extra)
    assert result.code == 2 and result.out == ""
    assert expected in result.error


def test_an_adapter_of_another_base(run, arguments, adapter, model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    other.model.norm.weight.data.mul_(2.0)
    GatedAdapter.random(other, 2).save(tmp_path / "other")
    result = run(*arguments, "--adapter", tmp_path / "other")
    assert result.code == 2 and "the adapter was trained for other weights" in result.error


def test_help(capsys):
    assert main(["tune", "--help"]) == 0
    assert "--adapter" in capsys.readouterr().out
