"""The comparison of ways to decode: processes in turn, a record, its page and pictures."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.decoding import compare, compare_report
from cllm import GatedAdapter
from cllm.bench.contenders import EAGER
from cllm.bench.contest import Contestant, Failed
from tests.one_thread import one_thread

__all__ = ["one_thread"]

OURS = "cllm, adapter, looked up"


@pytest.mark.slow
def test_compare(run, base, tasks, results, tmp_path, monkeypatch):
    adapter = GatedAdapter.random(AutoModelForCausalLM.from_pretrained(base), 2, scale=0.5)
    arguments = (
        *("--base", base, "--tasks", tasks, "--data", f"talk={tmp_path / 'sums.jsonl'}"),
        *("--adapter", adapter.save(tmp_path / "adapter"), "--limit", 2, "--warm-up", 0),
        *("--batch", 1, "--batch", 2, "--rounds", 2, "--work", tmp_path / "work"),
        *("--contender", "HuggingFace, prompt lookup", "--contender", OURS),
        *("--contender", "HuggingFace, draft model", "--record", "cpu"),
    )
    run(compare, *arguments)
    found = json.loads((results / "cpu" / "compare_float32.json").read_text())
    assert list(found["absent"]) == [
        "HuggingFace, draft model",
        "HuggingFace, prompt lookup, batch 2",
    ]
    for size, names in (("1", [EAGER, "HuggingFace, prompt lookup", OURS]), ("2", [EAGER, OURS])):
        for task in found["batches"][size].values():
            assert list(compare_report.contenders(task)) == names
            for one in compare_report.contenders(task).values():
                assert one["same"] == one["texts"] == 4
                assert one["tokens_per_second"]["median"] > 0 and one["peak_bytes"] > 1e7
            assert task[EAGER]["ratio"]["median"] == 1.0
            assert (task[EAGER]["first_token"] is not None) == (size == "1")
            assert (
                task[OURS]["tokens_per_forward"] >= 8 / 9 - 1e-9
            )  # eight tokens, the prefill counted

    # what is done is not done again
    def never(*_):
        raise Failed("run again")

    monkeypatch.setattr(Contestant, "decode", never)
    run(compare, *arguments)
    again = json.loads((results / "cpu" / "compare_float32.json").read_text())
    assert again["batches"]["1"] == found["batches"]["1"]

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text("\n".join(("above", *compare_report.MARKERS, "below")))
    (tmp_path / "README.md").write_text("\n".join(("over", *compare_report.README_MARKERS)))
    compare_report.main(results, docs)
    readme = (tmp_path / "README.md").read_text()
    assert "|  | sums |" in readme and "| fp32: " in readme and "gated adapter | " in readme
    page = (docs / "performance.md").read_text()
    assert page.startswith("above") and "| sums | cllm, adapter, looked up |" in page
    assert "- HuggingFace, draft model: no draft model was given (--draft)." in page
    for name in ("decoding_compare_float32.png", "decoding_memory_compare_float32.png"):
        assert (docs / name).stat().st_size > 5000
    torch.set_num_threads(1)


def test_the_page_is_that_of_the_records():
    page = (compare_report.DOCS / "performance.md").read_text()
    begin, end = compare_report.MARKERS
    written = page.split(begin)[1].split(end)[0].strip("\n")
    assert written == compare_report.section(compare_report.RESULTS)
    readme = (compare_report.DOCS.parent / "README.md").read_text()
    begin, end = compare_report.README_MARKERS
    written = readme.split(begin)[1].split(end)[0].strip("\n")
    assert written == compare_report.readme_section(compare_report.RESULTS)
