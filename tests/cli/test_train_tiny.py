"""The recipe that everybody can run, smaller: a model from scratch, its trajectories, a CLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE_BASE = ROOT / "recipes" / "tiny" / "make_base.py"
RECIPE = ROOT / "recipes" / "tiny" / "recipe.yaml"


def make_base(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, MAKE_BASE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_scratch_to_a_consistency_llm(run, tmp_path):
    base, data, out = tmp_path / "base", tmp_path / "trajectories", tmp_path / "cllm"
    size = ("--bytes", 1000, "--steps", 300, "--passage", 128)
    made = make_base(base, *size, "--prompts", 100, "--held-out", 12, "--prompt-bytes", 32)
    assert made.returncode == 0, made.stderr

    common = ("--config", RECIPE, "--model", base, "--threads", 1)
    collected = run(
        *("collect", *common, "--prompts", base / "prompts.jsonl", "--output", data),
        *("--max-new-tokens", 32),
    )
    assert collected.code == 0, collected.err

    trained = run(
        *("train", *common, "--trajectories", data, "--output", out, "--batch-size", 8),
        *("--eval-prompts", base / "held_out.jsonl", "--eval-max-new-tokens", 32),
        *("--ar-weight", 30, "--max-steps", 300, "--eval-steps", 75),
    )
    assert trained.code == 0, trained.err
    # before and after, in words
    assert "best model" in trained.out and "tokens per forward" in trained.out

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    best = json.loads((out / "best_checkpoint" / "metrics.json").read_text())
    steps = [entry for entry in history if "eval_tokens_per_forward" in entry]
    assert best["tokens_per_forward"] == max(
        entry["eval_tokens_per_forward"] for entry in steps if entry["eval_inside_bound"]
    )
    # prompts that it was not trained on, and the text is still the base model's
    assert best["tokens_per_forward"] > 1.15 * best["base_tokens_per_forward"]
    assert best["nll_under_base"] <= best["base_nll"] + 0.05
    assert best["exact_match"] >= 0.7


def test_a_text_without_room_is_refused_before_any_training(tmp_path):
    made = make_base(tmp_path / "base", "--bytes", 600, "--prompts", 500)
    assert made.returncode == 1
    assert "words to start at, fewer than 548" in made.stderr
    assert not list(tmp_path.glob("base/*.safetensors"))
