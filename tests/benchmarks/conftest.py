"""Tiny models and tasks for benchmarks, and a place for their records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from benchmarks import harness
from tests.decoding.tiny_models import fresh_model
from tests.decoding.tokenizer import letters_tokenizer


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path / "base"
    fresh_model("llama").save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    """A file of two tasks of two prompts; the source of "talk" must be named."""
    rows = [("how many eggs", "#### 3"), ("a dog sat on", "#### 4"), ("the cat", "#### 5")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    path = tmp_path / "tasks.yaml"
    path.write_text(
        f"sums: {{source: {tmp_path / 'sums.jsonl'}, prompt: question, answer: answer, "
        "max_new_tokens: 12, skip: 1}\n"
        "talk: {source: nowhere.jsonl, template: '{question}?', limit: 2, max_new_tokens: 8}\n"
    )
    return path


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """Runs a benchmark's `main` with arguments."""

    def call(module: ModuleType, *arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        module.main()  # type: ignore[attr-defined]

    return call


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Where records go meanwhile."""
    folder = tmp_path / "results"
    monkeypatch.setattr(harness, "RESULTS", folder)
    return folder
