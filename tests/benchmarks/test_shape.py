"""What a large model's iteration costs: its page, and what it says without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.decoding import shape, shape_report


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


@pytest.mark.parametrize("name", sorted(shape.SHAPES))
def test_shapes_are_those_of_the_models(name):
    model = shape.random_model(name, torch.bfloat16, "meta", 1)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    whole = shape.SHAPES[name]
    assert model.config.num_hidden_layers == 1
    assert model.get_output_embeddings().weight.shape == (whole["vocab_size"], whole["hidden_size"])
