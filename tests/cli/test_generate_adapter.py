"""``cllm generate --adapter``: the same rows, however good or bad the adapter."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from cllm import GatedAdapter

from .harness import PROMPTS, read_rows, write_prompts

SMALL = ("--max-new-tokens", 16, "--block-size", 6, "--device", "cpu")


@pytest.fixture
def adapter(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return GatedAdapter.random(model, 2, scale=1e3).save(tmp_path / "adapter")


@pytest.fixture
def batch(model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "few.jsonl", PROMPTS[:4])
    return ("generate", "--model", model_folder, "--prompts", prompts, *SMALL)


def test_the_text_stays(run, batch, adapter, tmp_path):
    plain, gated = tmp_path / "plain.jsonl", tmp_path / "gated.jsonl"
    assert run(*batch, "--output", plain).code == 0
    result = run(
        *batch, "--adapter", adapter, "--verify-size", 3, "--batch-size", 2, "--output", gated
    )
    assert result.code == 0
    assert "trained with the gate" not in result.err
    rows = list(zip(read_rows(plain), read_rows(gated), strict=True))
    assert all(left["token_ids"] == right["token_ids"] for left, right in rows)
    # another adapter or size is another run, which must not be mixed into the file
    assert f'"adapter": "{adapter}"' in gated.read_text()
    assert run(*batch, "--adapter", adapter, "--output", gated).code == 2


def test_not_trained_with_the_gate_is_said(run, batch, adapter):
    metadata = adapter / "cllm_adapter.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"gated": False}))
    result = run(*batch, "--adapter", adapter)
    assert result.code == 0
    assert f"{adapter} does not say that it was trained with the gate" in result.err


def test_large_batches_say_that_they_do_without(run, batch, adapter):
    unnamed = [part for part in batch if part not in ("--block-size", 6)]
    said = "in batches of 4 the adapter is not asked"
    for size, asked in ((4, False), (2, True)):
        result = run(*unnamed, "--adapter", adapter, "--batch-size", size)
        assert result.code == 0 and (said in result.err) is not asked
    assert said not in run(*batch, "--adapter", adapter, "--batch-size", 4).err


def test_bad_input(run, batch, adapter, model_folder):
    assert "--verify-size needs --adapter" in run(*batch, "--verify-size", 3).error
    too_many = run(*batch, "--adapter", adapter, "--verify-size", 7)
    assert too_many.code == 2
    assert "verify_size must be None or an integer from 1 to block_size=6" in too_many.error
    whole = run(*batch, "--adapter", model_folder)
    assert whole.code == 2
    assert "it holds a whole model" in whole.error
    missing = run(*batch, "--adapter", adapter / "nowhere")
    assert missing.code == 2
    assert "neither a folder nor a hub id" in missing.error
