"""``cllm bench``: the race, its table and JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from cllm.bench.contenders import CONTENDERS, EAGER
from cllm.commands import bench
from tests.one_thread import one_thread

from .harness import PROMPTS, write_prompts

__all__ = ["one_thread"]

OURS = "cllm, looked up, pool"


@pytest.fixture
def arguments(model_folder, tmp_path):
    prompts = write_prompts(tmp_path / "few.jsonl", PROMPTS[:3])
    return (
        *("bench", "--model", model_folder, "--prompts", prompts, "--limit", 2),
        *("--max-new-tokens", 6, "--device", "cpu", "--threads", 1, "--rounds", 1),
    )


@pytest.mark.slow
def test_json_and_table(run, arguments, tmp_path, capsys):
    work = tmp_path / "finished"
    chosen = ("--contender", OURS, "--contender", "HuggingFace, draft model", "--work", work)
    result = run(*arguments, *chosen, "--batch", 1, "--batch", 2, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["adapter"] is None
    assert found["absent"] == {"HuggingFace, draft model": "no draft model was given (--draft)"}
    for size in ("1", "2"):
        figures = found["batches"][size]
        assert list(figures) == ["prompts", "max_new_tokens", EAGER, OURS]
        for name in (EAGER, OURS):
            assert figures[name]["texts"] == figures[name]["same"] == 2
        assert figures[EAGER]["ratio"]["median"] == 1.0
    assert list(work.iterdir())

    assert "Loading weights" not in result.err
    capsys.readouterr()
    bench._print(found | {"adapter": {"name": "guesser"}})
    shown = capsys.readouterr().out
    assert "batch 2: 2 prompts, up to 6 new tokens each, decoded 1 time" in shown
    rows = [line.strip() for line in shown.splitlines() if line.strip().startswith(OURS)]
    assert len(rows) == 2 and all(row.endswith("2/2") for row in rows)
    assert "floor: " in shown and "adapter: guesser" in shown
    assert "not there: HuggingFace, draft model: no draft model was given (--draft)" in shown


def test_the_list(run):
    result = run("bench", "--contender", "list")
    assert result.code == 0 and result.out.splitlines() == list(CONTENDERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contender", "vllm"), "there is no contender 'vllm'; --contender list shows them"),
        (("--batch", 5), "--batch 5 needs as many prompts, but there are 2"),
        (("--adapter", "nowhere"), "nowhere"),
    ],
)
def test_bad_input(run, arguments, options, message):
    result = run(*arguments, *options)
    assert result.code == 2 and message in result.err
    assert len(result.err.strip().splitlines()) == 1
