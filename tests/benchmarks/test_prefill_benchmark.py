"""What reading a prompt costs: its record, and the page of it and of iterations."""

from __future__ import annotations

import json

import pytest

from benchmarks.decoding import iteration_report, prefill
from tests.decoding.test_native_layers import needs_native


@needs_native
def test_a_record(run, base, results, capsys):
    run(prefill, "--model", base, "--tokens", "3,150", "--rounds", 3, "--record", "cpu")
    record = json.loads((results / "cpu" / "prefill_float32.json").read_text())
    assert [one["tokens"] for one in record["prompts"]] == [3, 150]
    for one in record["prompts"]:
        assert one["native_ms"]["median"] > 0 and one["own_ms"]["median"] > 0
        assert one["ratio"]["low"] <= one["ratio"]["median"] <= one["ratio"]["high"]
    assert "native, ms" in capsys.readouterr().out


def test_a_model_without_native_layers(run, tmp_path, monkeypatch):
    from tests.decoding.tiny_models import tiny_model

    monkeypatch.setattr(prefill, "load", lambda *_: (tiny_model("gpt2"), None))
    with pytest.raises(SystemExit, match="GPT2LMHeadModel has no native layers here"):
        run(prefill, "--tokens", "3")


def test_the_page_is_that_of_the_records(tmp_path):
    page = (iteration_report.DOCS / "performance.md").read_text()
    (tmp_path / "performance.md").write_text(page)
    iteration_report.main(docs=tmp_path)
    assert (tmp_path / "performance.md").read_text() == page


def test_no_record_no_number(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("{}\n{}\n".format(*iteration_report.MARKERS))
    iteration_report.main(tmp_path / "nowhere", tmp_path)
    assert "Nothing has been recorded yet." in page.read_text()
