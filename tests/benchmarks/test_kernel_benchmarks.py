"""Each kernel benchmark runs on tiny sizes, and its record can be drawn and written down."""

from __future__ import annotations

import gc
import json
import weakref
from importlib import import_module

import pytest
import torch

from benchmarks.harness import rewrite
from benchmarks.kernels import decoder_layer, report
from benchmarks.kernels.cases import Case, Run, Variant
from benchmarks.kernels.harness import main
from benchmarks.kernels.memory import peak_in_child
from benchmarks.kernels.run_all import OPS
from cllm_kernels._backend import registered
from cllm_kernels._native import missing_reason


def run(op, *arguments):
    return import_module(f"benchmarks.kernels.{op}").run(["--device", "cpu", *arguments])


def check(record, *, left_out):
    assert json.loads(json.dumps(record)) is not None
    op = registered()[record["op"]]
    ceilings = record["ceilings"]
    assert ceilings["copy_bytes_per_second"] > 0
    assert all(rate > 0 for rate in ceilings["matmul_flop_per_second"].values())
    for name in ("date", "device", "torch", "commit", "default_backend"):
        assert record[name]
    assert record["cases"]
    for case in record["cases"]:
        entries = {entry["name"]: entry for entry in case["variants"]}
        assert {f"cllm {name}" for name in ("auto", *op.implementations)} <= set(entries)
        measured = [entry for entry in entries.values() if entry["status"] == "measured"]
        for entry in entries.values():
            if entry["status"] == "measured":
                assert 0 < entry["ms"]["low"] <= entry["ms"]["median"] <= entry["ms"]["high"]
                assert entry["times_auto"]["median"] > 0 and entry["share"]["floor"] > 0
                assert entry["bytes"] > 0 and entry["flop"] >= 0
            else:
                assert entry["status"] in ("unavailable", "left out"), entry
                assert entry["reason"]
        assert {"cllm auto", "cllm reference"} <= {entry["name"] for entry in measured}
        assert any(entry["kind"] == "baseline" for entry in measured)
        assert left_out == any(entry["status"] == "left out" for entry in entries.values())


def test_every_op_has_a_benchmark():
    assert set(OPS) == set(registered())


@pytest.mark.parametrize("op", OPS)
def test_quick_run(op):
    """Without the compiled variants, whose compilation takes most of a benchmark's time."""
    check(run(op, "--quick", "--no-memory", "--skip", "[Cc]ompiled|Flex"), left_out=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", OPS)
def test_quick_run_of_all_variants(op):
    check(run(op, "--quick", "--no-memory"), left_out=False)


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own():
    """The full logits of the eager formula show, and the result is told apart."""
    module = import_module("benchmarks.kernels.linear_argmax")
    case = module.cases(torch.device("cpu"), False)[2]
    rows, vocabulary = case.shape["M"], case.shape["V"]
    peak = peak_in_child(module.__file__, case.name, "matmul + argmax", False)
    logits = rows * vocabulary * 4
    assert peak["result_bytes"] == rows * 4
    assert logits <= peak["peak_bytes"] < 2 * logits
    if missing_reason() is None:
        ours = peak_in_child(module.__file__, case.name, "cllm cpp", False)
        assert ours["peak_bytes"] < logits


def test_a_variant_that_fails_or_differs_is_reported(tmp_path, monkeypatch):
    def broken(inputs):
        raise RuntimeError("not on this machine")

    def adding(number):
        return lambda inputs: Run(lambda: inputs["ones"] + number)

    variants = [
        Variant("right", "baseline", adding(0.0), 0, 64),
        Variant("raises", "baseline", broken, 0, 64),
        Variant("wrong", "baseline", adding(0.5), 0, 64),
        Variant("absent", "baseline", broken, 0, 64, unavailable="no such library"),
        Variant("cllm auto", "cllm", adding(0.0), 0, 64, "auto"),
    ]

    def cases(device, quick):
        inputs = lambda device: {"ones": torch.ones(8)}  # noqa: E731
        return [Case("x", torch.float32, {}, inputs, variants, 0, 64, tolerance=1e-6)]

    record = main("row_argmax", cases, __file__, "A test.", ["--quick", "--no-memory"])
    entries = {entry["name"]: entry for entry in record["cases"][0]["variants"]}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "right": "measured",
        "raises": "failed",
        "wrong": "failed",
        "absent": "unavailable",
        "cllm auto": "measured",
    }
    assert "not on this machine" in entries["raises"]["reason"]
    assert "more than" in entries["wrong"]["reason"]

    # The report shows all of them, and writes between its markers alone.
    page = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    (tmp_path / "performance.md").write_text(page)
    results = tmp_path / "results"
    (results / "cpu").mkdir(parents=True)
    (results / "cpu" / "kernels_row_argmax.json").write_text(json.dumps(record))
    report.main(results, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert report.NOTHING in text  # a --quick record is no measurement
    record["quick"] = False
    (results / "cpu" / "kernels_row_argmax.json").write_text(json.dumps(record))
    report.main(results, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nbelow\n")
    assert report.NO_GPU in text and "old" not in text
    assert "failed: RuntimeError: not on this machine" in text
    assert "unavailable: no such library" in text
    assert (tmp_path / "kernels_cpu_row_argmax.png").stat().st_size > 5000


def test_a_page_without_markers_is_left_alone():
    with pytest.raises(ValueError, match="must hold the lines"):
        rewrite("no markers\n", "<!-- a -->", "<!-- b -->", "text")


def test_a_captured_call_keeps_the_memory_that_its_graph_reads(monkeypatch):
    def made():
        read = torch.ones(3)
        return Run(lambda: 2 * read), weakref.ref(read)

    monkeypatch.setattr(decoder_layer, "capture", lambda call: (call(), lambda: None))
    run, read = made()
    run = decoder_layer.captured(run)
    gc.collect()
    assert run.call().tolist() == [2, 2, 2] and read() is not None
