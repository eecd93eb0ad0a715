"""What compiling is worth: its record and its page."""

from __future__ import annotations

import json
import sys
from typing import Any

import transformers as hf

from benchmarks.decoding import inductor, inductor_report
from benchmarks.harness import RESULTS
from cllm.decoding import inductor as decoding
from tests.decoding.tiny_models import CONFIGS


def test_the_page_is_that_of_the_records(tmp_path):
    page = (inductor_report.DOCS / "performance.md").read_text()
    (tmp_path / "performance.md").write_text(page)
    inductor_report.main(docs=tmp_path)
    assert (tmp_path / "performance.md").read_text() == page


def test_a_record(monkeypatch, tmp_path):
    graphs = []

    def lowered(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(decoding, "_lowered", lowered)
    monkeypatch.setattr(inductor, "SHAPES", {"tiny": CONFIGS["gpt-neox"]()})
    monkeypatch.setattr(inductor, "VOCABULARY", 90)
    written: dict[str, Any] = {}

    def write(record: dict[str, Any], folder: str, name: str) -> str:
        written[f"{folder}/{name}"] = json.loads(json.dumps(record))
        return name

    monkeypatch.setattr(inductor, "write_record", write)
    arguments = "--sizes 2,3 --tokens 3 --context 9 --rounds 2 --record cpu"
    monkeypatch.setattr(sys, "argv", ["inductor.py", *arguments.split()])
    inductor.main()
    (path,) = written
    assert path == "cpu/inductor_float32"
    rows = written[path]["models"]["tiny"]
    assert [one["n"] for one in rows] == [2, 3] and len(graphs) == 2
    assert all(one["seconds"]["inductor"]["median"] > 0 for one in rows)
    (tmp_path / "cpu").mkdir()
    (tmp_path / f"{path}.json").write_text(json.dumps(written[path]))
    assert "| tiny | 3 |" in inductor_report.section(tmp_path)
    assert inductor_report.section(RESULTS) != inductor_report.section(tmp_path)


def test_the_shapes_are_those_of_the_families():
    kinds = [type(config) for config in inductor.SHAPES.values()]
    assert kinds == [hf.Gemma3TextConfig, hf.GPTNeoXConfig, hf.GPT2Config, hf.LlamaConfig]
