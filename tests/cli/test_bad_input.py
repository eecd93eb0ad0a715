from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from cllm.commands.common import CommandError
from cllm.prompts import PromptError, read_prompts


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b'{"text": "x"}', 'the key "prompt" is missing'),
        (b'{"prompt": 7}', '"prompt" is a int, not a string'),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'["x"]', "expected an object"),
        (b'{"prompt": "\xff"}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", ["demo", "generate"])
def test_damaged_prompts_file_names_the_line(run, tmp_path, command, second, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + second + b"\n")
    result = run(command, "--prompts", path)
    assert result.code == 2 and result.out == ""
    assert f"{path}, line 3: {reason}" in result.error


def test_prompts_files(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n")
    with pytest.raises(PromptError, match="no prompts in it"):
        read_prompts(path)
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "id": "first"}\n{"prompt": "b"}')
    assert [(p.id, p.text, p.line) for p in read_prompts(path)] == [
        ("first", "a", 1),
        ("1", "b", 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--block-size", "0"), "--block-size"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--dtype", "int8"), "bfloat16"),
        (("--mode", "diagonal"), "sliding"),
        (("--limit", "0"), "--limit"),
        (("--model", "/no/such/model"), "there is no model folder /no/such/model"),
        (("--model", "./nowhere"), "there is no model folder ./nowhere"),
        (("--model", "nobody/nothing"), "cannot load 'nobody/nothing'"),
        (("--device", "toaster"), "device 'toaster' is not known"),
        (("--prompts", "missing.jsonl"), "missing.jsonl: No such file"),
        (("--prompts", "a.jsonl", "--prompt", "b"), "not both"),
        (("--prompt", " "), "empty"),
        (("--report", "x", "--no-report"), "not both"),
        (("--bogus",), "--bogus"),
    ],
)
def test_bad_options(run, model_folder, arguments, expected):
    if "--model" not in arguments:
        arguments = ("--model", model_folder, *arguments)
    extra = () if "--report" in arguments else ("--no-report",)
    result = run("demo", *arguments, *extra)
    assert result.code == 2
    assert expected in result.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_that_is_not_there(run, model_folder):
    result = run("demo", "--model", model_folder, "--device", "cuda", "--no-report")
    assert result.code == 2 and "sees no CUDA device" in result.error


def test_prompt_longer_than_the_context(run, model_folder):
    for command in (("demo", "--no-report"), ("generate",)):
        result = run(*command, "--model", model_folder, "--prompt", "eggs and " * 400)
        assert result.code == 2 and "the model's context is 512" in result.error


def test_block_larger_than_the_context(run, model_folder):
    result = run("generate", "--model", model_folder, "--prompt", "the cat", "--block-size", 4096)
    assert result.code == 2 and "block_size" in result.error


def test_output_folders(run, model_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("here first")
    result = run("demo", "--model", model_folder, "--prompt", "x", "--report", file)
    assert result.code == 2 and "is a file" in result.error
    result = run("generate", "--model", model_folder, "--prompt", "x", "--output", file / "rows")
    assert result.code == 2 and str(file) in result.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(run, model_folder, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = run("demo", "--model", model_folder, "--prompt", "x", "--report", locked)
    assert result.code == 2 and "not writable" in result.error


def test_broken_model_folders(run, model_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("generate", "--model", empty, "--prompt", "x")
    assert result.code == 2 and "no config.json" in result.error
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run("generate", "--model", broken, "--prompt", "x")
    assert result.code == 2 and f"cannot load the model in {broken}" in result.error


def test_debug_shows_the_traceback(run, monkeypatch):
    with pytest.raises(CommandError, match="the prompt is empty"):
        run("generate", "--debug", "--prompt", " ")


def test_interrupt_is_one_line(run, model_folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cllm.models.load_model", interrupted)
    result = run("generate", "--model", model_folder, "--prompt", "x")
    assert result.code == 130 and result.error == "cllm: interrupted"


def test_info(run, tmp_path):
    result = run("info", "--json")
    facts = json.loads(result.out)
    assert result.code == 0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    assert {"jacobi_step", "row_argmax", "linear_argmax"} <= facts["backends"].keys()
    assert facts["cache"] == str(tmp_path / "cache")
    assert facts["default_model"]["ready"] is False
    shown = run("info").out
    assert "jacobi_step" in shown and "C++ kernels" in shown and "not ready" in shown


def test_report(run, model_folder, tmp_path):
    records = tmp_path / "records.jsonl"
    arguments = ("--max-new-tokens", 8, "--output", tmp_path / "rows", "--trajectories", records)
    assert run("generate", "--model", model_folder, "--prompt", "the cat", *arguments).code == 0
    result = run("report", records)
    page = records.with_suffix(".html")
    assert result.code == 0 and f"page: {page}" in result.out
    assert "<html" in page.read_text()
    picture = tmp_path / "one.png"
    assert run("report", records, "--png", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("report", records, "--number", 2).error.endswith("holds 1 trajectories")
    records.write_text(records.read_text() + "{}\n")
    result = run("report", records)
    assert result.code == 2 and "line 2" in result.error
    result = run("report", tmp_path / "missing.jsonl")
    assert result.code == 2 and "No such file" in result.error
