"""``cllm demo`` with a gated adapter: the package's own, another, or none."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import cllm.trajectory
from cllm import GatedAdapter
from cllm.adapter import catalogue
from cllm.commands.chosen import ChosenAdapter, sizes
from cllm.commands.measure import PromptResult, SideResult
from cllm.commands.view import LiveView, results_table
from cllm.prompts import Prompt
from cllm.report import grouped
from cllm.trajectory import Iteration, Trajectory

SMALL = ("--prompt", "the cat", "--prompt", "the dog", "--max-new-tokens", 12, "--device", "cpu")


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture
def shipped(model, tmp_path, monkeypatch):
    """The tiny model's adapter, in a package folder of its own."""
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path / "shipped")
    adapter = GatedAdapter.random(model, 3, scale=0.5)
    adapter.metadata |= {"block_size": 6, "verify_size": 4, "tasks": ["gsm8k"]}
    return adapter.save(tmp_path / "shipped" / "tiny-guesser", dtype=torch.bfloat16)


@pytest.fixture
def other(model, tmp_path):
    """An adapter of the same base, whose metadata give no sizes."""
    return GatedAdapter.random(model, 2, scale=100.0).save(tmp_path / "other")


@pytest.fixture
def demo(run, model_folder):
    def call(*arguments):
        return run("demo", "--model", model_folder, *SMALL, *arguments)

    return call


def test_without_a_shipped_adapter_nothing_changes(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path / "nothing here")
    result = demo("--json")
    report = json.loads(result.out)
    assert result.code == 0 and report["identical"] is True
    assert report["adapter"] is None and report["iterations_without_adapter"] is None
    assert (report["block_size"], report["verify_size"]) == (8, None)
    table = demo("--no-report")
    assert "adapter" not in table.out + table.err
    assert "itera-" in table.out and "forwards:" not in table.out


def test_the_shipped_adapter_is_the_default(demo, shipped):
    result = demo("--json", "--no-report")
    report = json.loads(result.out)
    assert result.code == 0 and report["identical"] is True
    about = report["adapter"]
    assert (about["name"], about["shipped"], about["ranks"]) == ("tiny-guesser", True, [3])
    assert about["tasks"] == ["gsm8k"] and "the text is the base model's" in about["role"]
    assert about["mebibytes"] == pytest.approx(2 * about["parameters"] / 2**20)
    assert (report["block_size"], report["verify_size"]) == (6, 4)
    plain = json.loads(demo("--json", "--no-adapter").out)
    assert plain["adapter"] is None and plain["block_size"] == 8
    texts = [[row["text"] for row in one["prompts"]] for one in (report, plain)]
    assert texts[0] == texts[1]
    assert "guesses: adapter tiny-guesser (rank 3, 0.0 MiB)" in result.err


def test_given_sizes_and_adapter_win(demo, shipped, other):
    given = json.loads(demo("--json", "--block-size", 3).out)
    assert (given["block_size"], given["verify_size"]) == (3, 3)
    given = json.loads(demo("--json", "--adapter", other, "--verify-size", 2).out)
    assert (given["adapter"]["name"], given["adapter"]["shipped"]) == ("other", False)
    assert (given["block_size"], given["verify_size"]) == (8, 2)
    assert given["identical"] is True
    block = json.loads(demo("--json", "--mode", "block").out)
    assert (block["block_size"], block["verify_size"]) == (6, None)


def test_report_has_both_trajectories_of_a_prompt(demo, shipped, tmp_path):
    folder = tmp_path / "drawn"
    result = demo("--report", folder)
    assert result.code == 0, result.err
    recorded = cllm.trajectory.load(folder / "trajectories.jsonl")
    assert [one.title for one in recorded] == ["base model alone", "with adapter tiny-guesser"] * 2
    assert all(a.tokens == b.tokens for a, b in grouped(recorded))
    assert [one.block_size for one in recorded] == [6] * 4
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["trajectory-001.png", "trajectory-002.png"]
    plain, gated = ([len(one.iterations) for one in recorded[side::2]] for side in (0, 1))
    first = [len(one.tokens) for one in recorded[::2]]
    assert "one-token /" in result.out and "plain Jacobi /" in result.out
    for counts in (*zip(first, plain, gated, strict=True), map(sum, (first, plain, gated))):
        assert " / ".join(map(str, counts)) in result.out
    assert "guesses: adapter tiny-guesser (rank 3, 0.0 MiB); text: the base model's" in result.out


def test_json_with_a_report_counts_all_three(demo, shipped, tmp_path):
    report = json.loads(demo("--json", "--report", tmp_path / "drawn").out)
    rows = report["prompts"]
    recorded = cllm.trajectory.load(tmp_path / "drawn" / "trajectories.jsonl")
    assert [row["iterations_without_adapter"] for row in rows] == [
        len(one.iterations) for one in recorded[::2]
    ]
    assert [row["iterations"] for row in rows] == [len(one.iterations) for one in recorded[1::2]]
    total = sum(row["iterations_without_adapter"] for row in rows)
    assert report["iterations_without_adapter"] == total


def test_cllm_report_draws_them_again(demo, run, shipped, tmp_path):
    demo("--report", tmp_path / "drawn")
    records = tmp_path / "drawn" / "trajectories.jsonl"
    result = run("report", records, "--terminal", "--number", 2, "--png", tmp_path / "two.png")
    assert result.code == 0
    assert result.out.index("base model alone") < result.out.index("with adapter tiny-guesser")
    assert (tmp_path / "two.png").read_bytes() == (
        tmp_path / "drawn" / "trajectory-002.png"
    ).read_bytes()
    result = run("report", records, "--number", 3)
    assert result.error.endswith("holds trajectories of 2 prompts")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--adapter", "x", "--no-adapter"), "give --adapter or --no-adapter, not both"),
        (("--no-adapter", "--verify-size", 2), "leave --no-adapter out"),
        (("--verify-size", 5, "--block-size", 4), "--verify-size 5 is above --block-size 4"),
        (("--verify-size", 7), "verify_size must be None or an integer from 1 to block_size=6"),
        (("--mode", "block", "--verify-size", 2), "must equal block_size=6 in block mode"),
        (("--adapter", "no/such/place"), "neither a folder nor a hub id"),
    ],
)
def test_bad_options(demo, shipped, arguments, reason):
    result = demo("--no-report", *arguments)
    assert result.code == 2 and reason in result.error


def test_verify_size_without_any_adapter(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "SHIPPED", tmp_path / "nothing here")
    result = demo("--no-report", "--verify-size", 2)
    assert result.code == 2
    assert "--verify-size needs an adapter, and none is in use" in result.error


def test_an_adapter_for_another_base(demo, model, tmp_path):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    folder = GatedAdapter.random(model, 2).save(tmp_path / "elsewhere")
    result = demo("--no-report", "--adapter", folder)
    assert result.code == 2 and "the adapter was trained for other weights" in result.error


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "cllm_adapter.json", "sizes"])
def test_a_damaged_shipped_adapter_is_said(demo, shipped, what):
    if what == "sizes":
        path, reason = shipped / "cllm_adapter.json", "say block_size 'six', not an integer"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": "six"}))
    else:
        (shipped / what).write_bytes((shipped / what).read_bytes()[:50])
        reason = "the adapter tiny-guesser that ships with cllm-kernels is damaged (cannot read"
    result = demo("--no-report")
    assert result.code == 2 and reason in result.error
    assert demo("--no-report", "--no-adapter").code == 0
    shutil.rmtree(shipped)
    assert demo("--no-report").code == 0


def test_sizes_give_way(model):
    adapter = GatedAdapter.random(model, 2)
    adapter.metadata |= {"block_size": 16, "verify_size": 8}
    chosen = ChosenAdapter("x", adapter, "x")
    assert sizes(None, None, "sliding", chosen) == (16, 8)
    assert sizes(4, None, "sliding", chosen) == (4, 4)
    assert sizes(None, 5, "sliding", chosen) == (16, 5)
    assert sizes(None, None, "block", chosen) == (16, None)
    assert sizes(None, None, "sliding", None) == (8, None)


def result_of(tokens: int, plain: int | None, gated: int) -> PromptResult:
    def trajectory(count):
        steps = [Iteration(i, [1], [2], 1, 1) for i in range(count)]
        return Trajectory([1], [2] * tokens, steps, 16, "sliding")

    return PromptResult(
        Prompt("humaneval/12", "x"), 3, "", SideResult([2] * tokens, tokens, 1.0),
        SideResult([2] * tokens, gated, 0.6), trajectory(gated), None,
        plain=None if plain is None else trajectory(plain),
    )  # fmt: skip


def test_table_fits_eighty_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table([result_of(128, 117, 64), result_of(128, 119, 71)], adapter=True))
    text = console.file.getvalue()
    assert "128 / 117 / 64" in text and "256 / 236 / 135" in text
    assert "humaneval/12" in text and "1.67x" in text and "yes" in text and "…" not in text
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table([result_of(128, None, 64)], adapter=True))
    assert "128 / 64" in console.file.getvalue()
    assert "plain Jacobi" not in console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_live_view_says_who_guesses(model, width):
    line = ChosenAdapter("tiny-guesser", GatedAdapter.random(model, 3), "tiny-guesser").line
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30)
    with LiveView(console, lambda ids: "text", "tiny-llama", 16, line) as view:
        view.prompt(1, 1, Prompt("gsm8k/0", "how many"))
        frame = console.render_lines(view._frame())
    plain = ["".join(segment.text for segment in row) for row in frame]
    assert all(len(row) <= width for row in plain)
    text = "\n".join(plain)
    assert "guesses: adapter tiny-guesser (rank 3" in text
    assert width < 80 or "Jacobi with adapter, n = 16" in text
    assert width < 80 or "text: the base model's" in text
