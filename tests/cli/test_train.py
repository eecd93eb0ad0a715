"""``cllm train``: flags and recipes, what it leaves, what it refuses."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cllm
from benchmarks.training.curves import draw, read_run
from cllm.commands.train_settings import eval_prompts, read_settings, training_arguments
from cllm.training.recipe import RecipeError
from tests.training.tiny_trajectories import store

from .harness import PROMPTS, start, write_prompts


@pytest.fixture(scope="session")
def trajectories(model_folder, tmp_path_factory):
    """Six responses of the tiny model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return store(tmp_path_factory.mktemp("trajectories") / "tiny", model, tokenizer, 6)


@pytest.fixture
def flags(model_folder, trajectories, tmp_path):
    """What every run needs."""
    return (
        *("train", "--model", model_folder, "--trajectories", trajectories),
        *("--output", tmp_path / "out", "--max-steps", 2, "--threads", 1),
    )


def test_flags_to_a_folder_that_decodes(run, flags, tmp_path):
    prompts = write_prompts(tmp_path / "eval.jsonl", PROMPTS[:3])
    result = run(
        *flags,
        *("--eval-prompts", prompts, "--eval-steps", 1, "--eval-max-new-tokens", 8),
        *("--learning-rate", 1e-4, "--batch-size", 2, "--no-stop-on-quality"),
    )
    assert result.code == 0, result.err
    assert "3 held-out prompts" in result.out and f"last model, step 2: {tmp_path / 'out'}" in (
        result.out
    )
    assert "step 1: " in result.err and "the bound" in result.err
    out = tmp_path / "out"
    recipe = json.loads((out / "cllm_recipe.json").read_text())
    assert recipe["arguments"]["per_device_train_batch_size"] == 2
    assert recipe["arguments"]["learning_rate"] == 1e-4 and recipe["step"] == 2
    decoded = run("generate", "--model", out, "--prompt", "the cat", "--max-new-tokens", 4)
    assert decoded.code == 0 and decoded.out

    curve = read_run(out)  # what the benchmark makes of it
    assert [point["step"] for point in curve["evaluations"]] == [1, 2]
    assert curve["trained"]["nominal"] == curve["evaluations"][-1]["noisy_tokens"] > 0
    draw({"runs": {"tiny": curve}}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_and_flags_that_win(run, flags, model_folder, trajectories, tmp_path):
    prompts = tmp_path / "eval.jsonl"
    prompts.write_text('{"question": "the cat"}\n{"question": "the dog"}\n{"question": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""\
model: {model_folder}
collect:
  limit: 3
train:
  trajectories: {trajectories}
  output: {tmp_path / "recipe-out"}
  learning-rate: 1e-5
  max_steps: 9
  weight_decay: 0.01
  ar_weight: 3
  eval_prompts:
    - prompts: {prompts}
      prompt_column: question
      limit: 2
    - {{prompts: {prompts}, prompt_column: question, skip: 2, shuffle_seed: 0}}
  eval_max_new_tokens: 4
  use_cpu: true
"""
    )
    result = run("train", "--config", recipe, "--max-steps", 1, "--lora-r", 2, "--merge-lora")
    assert result.code == 0, result.err
    out = tmp_path / "recipe-out"
    written = json.loads((out / "cllm_recipe.json").read_text())["arguments"]
    assert (written["max_steps"], written["learning_rate"]) == (1, 1e-5)
    assert (written["weight_decay"], written["ar_weight"], written["lora_r"]) == (0.01, 3, 2)
    # evaluated at the end although no eval_steps were given
    assert "3 held-out prompts" in result.out
    AutoModelForCausalLM.from_pretrained(out)


def test_held_out_prompts_by_the_names_of_the_flags(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "one", "d": "x"}\n{"q": "two", "d": "x"}\n')
    # a line's end as a shell hands it over, and as YAML does
    for template in ("{d}\\n{q}", "{d}\n{q}"):
        own = {"eval_prompts": {"prompts": str(rows), "prompt-template": template, "skip": 1}}
        assert [prompt.text for prompt in eval_prompts(own)] == ["x\ntwo"]
        flags = {"eval_prompts": str(rows), "eval_template": template, "eval_limit": 1}
        assert [prompt.text for prompt in eval_prompts(flags)] == ["x\none"]
    with pytest.raises(RecipeError, match="'prompt_column' is there twice"):
        eval_prompts({"eval_prompts": {"prompt-column": "q", "prompt_column": "q"}})
    with pytest.raises(RecipeError, match="takes files and mappings, not 3"):
        eval_prompts({"eval_prompts": [3]})
    with pytest.raises(RecipeError, match="unknown setting 'prompt_colum'"):
        eval_prompts({"eval_prompts": {"prompts": str(rows), "prompt-colum": "q"}})


def test_a_gated_adapter(run, flags, model_folder, trajectories, tmp_path):
    prompts = write_prompts(tmp_path / "eval.jsonl", PROMPTS[:2])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gated: true\nlora_r: 2\nlearning_rate: 1e-2\neval_max_new_tokens: 8\n")
    result = run(*flags, "--config", recipe, "--eval-prompts", prompts)
    assert result.code == 0, result.err
    assert "best model, step 2" in result.out
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)
    for folder in (tmp_path / "out", tmp_path / "out" / "best_checkpoint"):
        written = json.loads((folder / "cllm_adapter.json").read_text())
        assert written["gated"] is True and written["base_model"] == str(model_folder)
        found = cllm.generate(model, ids, adapter=folder, max_new_tokens=16)
        assert torch.equal(found, expected)


def test_an_interrupted_run_goes_on(run, flags, tmp_path):
    saving = ("--save-steps", 1)
    process = start(*flags, *saving, "--max-steps", 100000)
    try:
        deadline = time.monotonic() + 90
        while not list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and "go on with --resume last" in errors
    refused = run(*flags, *saving)
    assert refused.code == 2 and "go on with it by --resume last" in refused.error
    checkpoints = (tmp_path / "out").glob("checkpoint-*")
    done = max(int(path.name.removeprefix("checkpoint-")) for path in checkpoints)
    result = run(*flags, *saving, "--max-steps", done + 3, "--resume", "last")
    assert result.code == 0, result.err
    assert f"step {done + 3}" in result.out


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("--trajectories", "nowhere"), "nowhere has no manifest.json"),
        (("--output", "file"), "file is a file"),
        (("--learning-rate", "fast"), "--learning-rate"),
        (("--teacher", "nobody"), "teacher must be one of 'self', 'base', 'ema'"),
        (("--dtype", "int8"), "--dtype"),
        (("--max-steps", "0"), "--max-steps"),
        (("--eval-steps", "1"), "--eval-steps needs --eval-prompts"),
        (("--eval-prompts", "missing.jsonl"), "missing.jsonl"),
        (("--resume", "nowhere"), "there is no checkpoint folder nowhere"),
        (("--resume", "last"), "no checkpoint to resume from"),
        (("--lora-r", "2", "--lora-targets", "nothing"), "lora_targets ['nothing']"),
        (("--merge-lora",), "merge_lora needs adapters"),
        (("--gated",), "--gated trains a LoRA adapter: give its rank, --lora-r"),
        (("--gated", "--lora-r", "2", "--merge-lora"), "a gated adapter is never merged"),
        (("--gated", "--lora-r", "2", "--teacher", "ema"), "must be 'self' or 'base', not 'ema'"),
        (("--config", "missing.yaml"), "missing.yaml: No such file"),
        (("--model", "./nowhere"), "there is no model folder ./nowhere"),
        (("--lerning-rate", "1"), "--lerning-rate"),
    ],
)
def test_bad_input(run, flags, extra, expected):
    with open("file", "w"):
        pass
    result = run(*flags, *extra)
    assert result.code == 2 and result.out == ""
    assert expected in result.error


def test_what_must_be_said(run, flags):
    assert "--output FOLDER" in run("train").error
    assert "--trajectories FOLDER" in run("train", "--output", "out").error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1e-5\n", "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ("train:\n  ar_wieght: 1\n", "section train: unknown setting 'ar_wieght'; did you mean"),
        ("epochs: 1\nnum_train_epochs: 2\n", "'epochs' and 'num_train_epochs' are one setting"),
        ("ar_weight: heavy\n", "ar_weight must be a number, not 'heavy'"),
        ("eval_prompts:\n  file: x\n", "eval_prompts: unknown setting 'file'"),
        ("eval_prompts: {split: test}\n", "say which file or data set"),
        ("dtype: int8\n", "dtype must be one of float32"),
    ],
)
def test_bad_recipes(run, flags, tmp_path, text, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = run(*flags, "--config", recipe)
    assert result.code == 2 and expected in result.error


def test_another_models_trajectories(run, flags, model_folder, tmp_path):
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    result = run(*flags, "--model", folder)
    assert result.code == 2 and "the tokenizer is not the one that" in result.error


@pytest.mark.parametrize(
    "name",
    [
        "smollm2_gpu.yaml",
        "smollm2_cpu.yaml",
        "gated_cpu.yaml",
        "gated_gpu.yaml",
        "tiny/recipe.yaml",
    ],
)
def test_the_recipes_in_the_repository_are_settings(name, tmp_path):
    path = Path(__file__).resolve().parents[2] / "recipes" / name
    own, values = read_settings(path, {"output": str(tmp_path)})
    values.pop("bf16", None)  # needs a GPU
    args = training_arguments(own, {**values, "use_cpu": True})
    assert args.eval_steps > 0 and own["eval_prompts"]
    assert args.consistency_config().teacher == "base" or args.gated
