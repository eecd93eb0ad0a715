"""What a large model's iteration costs: its page, and what it says without a GPU."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time

import pytest
import torch

import cllm
from benchmarks.decoding import shape, shape_report
from benchmarks.harness import RESULTS
from cllm.decoding.static_loop import Readback
from tests.decoding.test_graphs import recorder  # noqa: F401  a fixture
from tests.decoding.tiny_models import tiny_model


def test_the_page_is_that_of_the_records(tmp_path):
    page = (shape_report.DOCS / "performance.md").read_text()
    (tmp_path / "performance.md").write_text(page)
    shape_report.main(docs=tmp_path)
    assert (tmp_path / "performance.md").read_text() == page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shape.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        shape.main()


def test_other_windows(tmp_path):
    assert shape.windows("8,4x2,16a,8ax3") == [
        (8, 1, False), (4, 2, False), (16, 1, True), (8, 3, True)
    ]  # fmt: skip
    path = next(RESULTS.glob("*/shape_*.json"))
    found = json.loads(path.read_text())
    row = {"n": 8, "candidates": 3, "rank": 24, "rows": 48, "iteration_ms": 9.0}
    timed = row | {"host_us": 21.6}
    lines = shape_report.shape_section(found | {"windows": [row]}, path)
    ratio = 9.0 / found["sizes"]["1"]["iteration_ms"]
    assert f"| 8 | 3 | 24 | 48 | 9.00 | {ratio:.3f} x |" in lines
    lines = shape_report.shape_section(found | {"windows": [timed]}, path)
    assert f"| 8 | 3 | 24 | 48 | 9.00 | {ratio:.3f} x | 22 |" in lines


def test_they_are_timed_with_an_adapter_and_without(monkeypatch):
    seen = []

    def timed(model, prompt, n, tokens, **changes):
        seen.append((n, changes["candidates"], changes["adapter"] is not None))
        # what runs there under graphs runs
        out = cllm.generate(
            model, prompt, max_new_tokens=tokens, block_size=n, accept="one", **changes
        )
        assert out.shape[1] == prompt.shape[1] + tokens
        return shape.IterationTime(0.5, 2e-5)

    monkeypatch.setattr(shape, "time_iterations", timed)
    model = tiny_model("llama")
    wanted = shape.windows("4,4x2,4a,4ax2")
    options = argparse.Namespace(rank=2, tokens=3)
    rows = shape.time_windows(model, torch.randint(5, 90, (1, 9)), wanted, options)
    assert seen == wanted and [row["rows"] for row in rows] == [4, 8, 8, 16]
    assert {(row["iteration_ms"], row["host_us"]) for row in rows} == {(500.0, 20.0)}


def test_what_the_host_does_has_a_column_where_it_was_measured():
    path = next(RESULTS.glob("*/shape_*.json"))
    found = json.loads(path.read_text())
    sizes = {n: row | {"host_us": 12.4} for n, row in found["sizes"].items()}
    lines = shape_report.shape_section(found | {"sizes": sizes}, path)
    assert any(line.endswith("| 1.000 x | 12 |") for line in lines)
    assert any(line.endswith("| host, us |") for line in lines)


@pytest.mark.usefixtures("recorder")
def test_waiting_for_the_device_is_not_the_hosts_work(monkeypatch):
    def wait(readback):
        time.sleep(0.03)

    monkeypatch.setattr(Readback, "wait", wait)
    # its own, with which its captures go
    model, prompt = copy.deepcopy(tiny_model("llama")), torch.randint(5, 90, (1, 9))
    settings = dict(max_new_tokens=5, block_size=3, accept="one", compile="graph")
    cllm.generate(model, prompt, **settings)
    with shape.host_times() as host:
        started = time.perf_counter()
        cllm.generate(model, prompt, **settings)
        whole = time.perf_counter() - started
    assert len(host) >= 5  # replays, of which one more may have been launched
    assert whole > 0.03 * (len(host) - 1) > 0 and sum(host) < whole - 0.03 * (len(host) - 1)
    assert Readback.wait is wait


@pytest.mark.parametrize("name", sorted(shape.SHAPES))
def test_shapes_are_those_of_the_models(name):
    model = shape.random_model(name, torch.bfloat16, "meta", 1)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    whole = shape.SHAPES[name]
    assert model.config.num_hidden_layers == 1
    assert model.get_output_embeddings().weight.shape == (whole["vocab_size"], whole["hidden_size"])
