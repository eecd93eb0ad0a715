"""Held-out results, curves, the trade-off: they run on tiny models and can be written down."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.training import held_out, report, tradeoff
from tests.decoding.tiny_models import fresh_model
from tests.decoding.tokenizer import letters_tokenizer
from tests.training.tiny_trajectories import store


@pytest.fixture
def other(base, tmp_path):
    """The same with other weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.add_(0.05 * torch.randn_like(model.lm_head.weight))
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


def test_held_out_results(monkeypatch, run, base, other, tasks, results, tmp_path):
    arguments = (
        *("--base", base, "--model", f"other={other}", "--tasks", tasks),
        *("--data", f"talk={tmp_path / 'sums.jsonl'}", "--work", tmp_path / "work"),
        *("--speed-prompts", 2, "--batch-size", 2, "--record", "cpu"),
    )
    run(held_out, *arguments)
    path = results / "cpu" / "cllm_held_out.json"
    record = json.loads(path.read_text())
    assert {name: task["prompts"] for name, task in record["tasks"].items()} == {
        "sums": 2, "talk": 2,
    }  # fmt: skip
    for name, task in record["tasks"].items():
        mine, theirs = task["models"]["base"], task["models"]["other"]
        assert mine["exact_match"] == mine["equal_leading"] == 1.0
        assert mine["nll_under_base"] == mine["base_nll"] == theirs["base_nll"]
        assert theirs["nll_under_base"] > mine["nll_under_base"]
        assert theirs["exact_match"] < 1.0
        assert ("answer_accuracy" in mine) == (name == "sums")
        assert set(task["speed"]) == {
            f"{how}, {model}"
            for how in ("HuggingFace greedy", "Jacobi")
            for model in ("base", "other")
        }
        assert all(speed["tokens_per_second"]["median"] > 0 for speed in task["speed"].values())

    # what is finished is kept, for these weights only
    def never(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(held_out, "decode_texts", never)
    run(held_out, *arguments)
    again = json.loads(path.read_text())
    assert [task["models"] for task in again["tasks"].values()] == [
        task["models"] for task in record["tasks"].values()
    ]
    model = fresh_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    model.save_pretrained(other)
    with pytest.raises(AssertionError, match="decoded again"):
        run(held_out, *arguments)

    for name in ("performance.md", "results.md"):
        (tmp_path / name).write_text("above\n{}\n{}\nbelow\n".format(*report.MARKERS))
    report.main(results, tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "### sums: 2 held-out prompts, at most 12 tokens" in page
    assert (
        f"| other | {record['tasks']['sums']['models']['other']['tokens_per_forward']:.3f}" in page
    )
    assert "| HuggingFace greedy, base |" in page and page.endswith("below\n")
    assert "Nothing has been recorded yet." in (tmp_path / "performance.md").read_text()


@pytest.mark.slow
def test_tradeoff(run, base, results, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    data = store(tmp_path / "data", model, letters_tokenizer(), 6)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "the cat"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {base}\ntrain:\n  trajectories: {data}\n"
        f"  eval_prompts: {tmp_path / 'eval.jsonl'}\n"
        "  eval_max_new_tokens: 4\n  use_cpu: true\n"
    )
    arguments = (
        *(recipe, "--work", tmp_path / "runs", "--teachers", "base", "--ar-weights", 1, 10),
        *("--plot", tmp_path / "plot.png", "--", "--max-steps", 1, "--no-stop-on-quality"),
    )
    run(tradeoff, *arguments)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    logs = [tmp_path / "runs" / f"base-{weight}.log" for weight in (1, 10)]
    finished = [log.stat().st_mtime_ns for log in logs]
    run(tradeoff, *arguments)
    assert [log.stat().st_mtime_ns for log in logs] == finished  # not made again
    with pytest.raises(SystemExit, match="base-3 ended with exit code 2; see"):
        run(
            tradeoff, recipe, "--work", tmp_path / "runs", "--teachers", "base",
            "--ar-weights", 3, "--", "--eval-steps", "often",
        )  # fmt: skip


def test_committed_records_are_what_the_pages_say(tmp_path):
    """The sections of the pages are those that the records make."""
    for name in ("performance.md", "results.md"):
        (tmp_path / name).write_text((report.DOCS / name).read_text())
    for picture in report.DOCS.glob("*.png"):
        (tmp_path / picture.name).touch()
    report.main(docs=tmp_path)
    for name in ("performance.md", "results.md"):
        assert (tmp_path / name).read_text() == (report.DOCS / name).read_text(), name
