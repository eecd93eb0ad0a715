from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import cllm.trajectory
from cllm.cli import app
from cllm.commands import demo, measure
from cllm.commands.measure import Difference, PromptResult, SideResult
from cllm.commands.view import LiveView, Totals, results_table
from cllm.prompts import Prompt, encode, shipped_prompts
from cllm.trajectory import Trajectory

from .harness import PROMPTS, start

SMALL = ("--max-new-tokens", 12, "--block-size", 4, "--device", "cpu")


def test_json_is_one_object_and_the_only_output(run, model_folder, prompts_file):
    result = run("demo", "--model", model_folder, "--prompts", prompts_file, "--limit", 3,
                 "--json", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["model"] == str(model_folder)
    assert report["dtype"] == "float32" and report["block_size"] == 4
    assert {"python", "torch", "transformers", "cllm-kernels"} <= report["versions"].keys()
    assert report["identical"] is True
    assert [row["prompt"] for row in report["prompts"]] == PROMPTS[:3]
    for row in [report, *report["prompts"]]:
        one, jacobi = row["autoregressive"], row["jacobi"]
        assert row["tokens"] == jacobi["tokens"] == one["tokens"] > 0
        assert 0 < row["iterations"] <= row["tokens"]
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["iterations"])
        assert jacobi["tokens_per_second"] == pytest.approx(jacobi["tokens"] / jacobi["seconds"])
        ratio = jacobi["tokens_per_second"] / one["tokens_per_second"]
        assert row["speedup"] == pytest.approx(ratio)
        assert row["identical"] is True
    for name in ("tokens", "iterations"):
        assert report[name] == sum(row[name] for row in report["prompts"])
    assert report["report"] == [] and list(Path.cwd().iterdir()) == []


def test_text_is_what_huggingface_generates(run, model_folder):
    result = run("demo", "--model", model_folder, "--prompt", PROMPTS[0], "--json", *SMALL)
    row = json.loads(result.out)["prompts"][0]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = encode(tokenizer, Prompt("x", PROMPTS[0]))[None]
    whole = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert row["prompt_tokens"] == ids.shape[1]
    expected = whole[0, ids.shape[1] :]
    assert row["tokens"] == len(expected)
    assert row["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_table_and_report(run, model_folder, tmp_path):
    folder = tmp_path / "drawn"
    result = run("demo", "--model", model_folder, "--prompt", "the cat", "--prompt", "the dog",
                 "--report", folder, *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert "identical" in result.out and "total" in result.out and "prompt 2" in result.out
    assert f"report: {folder / 'index.html'}" in result.out
    recorded = cllm.trajectory.load(folder / "trajectories.jsonl")
    first, second = (len(trajectory.tokens) for trajectory in recorded)
    assert f"1/2 prompt 1: {first} tokens" in result.err
    assert f"2/2 prompt 2: {second} tokens" in result.err
    assert "<html" in (folder / "index.html").read_text()


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("fill", ["prompt", "last", "random", "pad"])
def test_every_mode_and_fill(run, model_folder, mode, fill):
    result = run("demo", "--model", model_folder, "--prompt", "the cat", "--mode", mode,
                 "--fill", fill, "--json", *SMALL)  # fmt: skip
    report = json.loads(result.out)
    assert result.code == 0 and report["identical"] is True
    assert (report["mode"], report["fill"]) == (mode, fill)


def test_bfloat16_says_where_near_ties_are(run, model_folder):
    result = run("demo", "--model", model_folder, "--prompt", "the cat", "--dtype", "bfloat16",
                 "--no-report", *SMALL)  # fmt: skip
    assert result.code == 0, result.err
    assert "against one full forward: 12 tokens: " in result.out


def test_fp32_difference_fails_and_says_where(run, model_folder, monkeypatch):
    """The tiny model's weights change between the two sides, so that they truly differ."""
    decode = measure.Measurement._decode

    def sabotaged(self, side, *arguments):
        if side == "jacobi":
            with torch.no_grad():
                self._loaded.model.lm_head.weight.neg_()
        return decode(self, side, *arguments)

    monkeypatch.setattr(measure.Measurement, "_decode", sabotaged)
    result = run("demo", "--model", model_folder, "--prompt", "the cat", "--no-report", *SMALL)
    assert result.code == 1
    assert "prompt 1: differs from token 0 on: one-token " in result.out
    assert "logit gap" in result.out


def test_live_view_draws_both_sides_at_any_width(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("the cat sat on the mat and the dog sat")["input_ids"]
    side = SideResult(ids, len(ids), 0.5)
    faster = SideResult(ids, len(ids) // 2, 0.25)
    prompt = Prompt("gsm8k/0", "how many eggs [bold]are[/bold] there")
    trajectory = Trajectory([1], ids, [], 4, "sliding")
    result = PromptResult(prompt, 3, "", side, faster, trajectory, None)
    for width in (60, 80, 140):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=width, height=30)
        with LiveView(console, tokenizer.decode, "tiny-llama", 4) as view:
            view.prompt(1, 2, prompt)
            view.tokens("autoregressive", ids[:3], 1, 3, 0.1)
            view._drawn = 0.0
            view.tokens("jacobi", ids[:5], 3, 2, 0.1)
            frame = console.render_lines(view._frame())
            plain = ["".join(segment.text for segment in line) for line in frame]
            new = tokenizer.decode(ids[:5])[len(tokenizer.decode(ids[:2])) :]
            marked = [s.text for line in frame for s in line if s.style and s.style.bgcolor]
            view.finished(result)
        assert all(len(line) <= width for line in plain)
        text = "\n".join(plain)
        assert "one token at a time" in text and "Jacobi, n = 4" in text
        assert "[bold]" in text and "5 tokens" in text
        assert new.strip() in "".join(marked)
        assert "so far: " in stream.getvalue()
        assert width < 80 or "identical 1 of 1" in stream.getvalue()


def test_drawing_is_off_the_clock(model_folder):
    clock = measure._Clock("jacobi", _SlowView())
    clock.put(torch.tensor([[1, 2]]))
    clock.put(torch.tensor([3, 4]))
    clock.put(torch.tensor([5]))
    clock.end()
    assert clock.seconds() < 0.1


class _SlowView:
    def tokens(self, side, ids, new, steps, seconds):
        import time

        assert (ids, new, steps) in (([3, 4], 2, 1), ([3, 4, 5], 1, 2))
        time.sleep(0.2)


def test_remarks_name_the_flip_and_its_gap():
    trajectory = Trajectory([1], [5, 6], [], 4, "sliding")
    difference = Difference(1, " cat", " dog", 0.0, 0.25)
    sides = SideResult([5, 7], 2, 1.0), SideResult([5, 6], 1, 1.0)
    result = PromptResult(Prompt("a", "b"), 1, "", *sides, trajectory, difference)
    (line,) = demo._remarks(result, demo.Dtype.bfloat16)
    assert "differs from token 1 on: one-token ' cat' (logit gap 0), Jacobi ' dog'" in line
    assert "(logit gap 0.25)" in line and "near-ties flip" in line
    assert not Totals([result]).identical
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table([result]))
    assert " no " in console.file.getvalue()


def test_shipped_prompts_are_twenty_of_each():
    prompts = shipped_prompts()
    names = [prompt.id.split("/")[0] for prompt in prompts]
    assert names.count("gsm8k") == names.count("humaneval") == 20
    assert names[:4] == ["gsm8k", "humaneval", "gsm8k", "humaneval"]
    assert all("```python" in prompt.text for prompt in prompts[1::2])
    assert len({prompt.text for prompt in prompts}) == 40


def test_help_names_every_command_without_torch():
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("demo", "generate", "info", "report", "adapter"))


@pytest.mark.parametrize(
    ("command", "default"),
    [
        (("demo",), "[default: what the adapter was made for, 8 without one]"),
        (("generate",), "[default: standard output]"),
        (("adapter", "export"), "[default: that of the training]"),
    ],
)
def test_help_says_defaults(command, default):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*command, "--help"])
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 0 and default in words


def test_process_writes_nothing_but_json(model_folder, tmp_path):
    process = start("demo", "--model", model_folder, "--prompt", "the cat", "--json", *SMALL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert json.loads(out)["identical"] is True
    assert "Warning" not in err and "it/s" not in err
