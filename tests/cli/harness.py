"""Prompts for the tiny model, and ways to run ``cllm`` and look at what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cllm
import cllm_kernels

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "how many eggs does the duck lay in a day and in a week",
    "def add(first, second): return first + second",
]
PROMPTS = [f"{sentence} {number}" for number in range(8) for sentence in SENTENCES]


@dataclass(frozen=True)
class Result:
    """What a run of ``cllm`` left."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error line, after checking that it is the only one and that there is no traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("cllm: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def write_prompts(path: Path, prompts: list[str]) -> Path:
    """A prompts file."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    return path


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment() -> dict[str, str]:
    """For a process of its own that imports the packages under test."""
    roots = [str(Path(package.__file__).parents[1]) for package in (cllm, cllm_kernels)]
    paths = [*roots, os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings}


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start ``cllm`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cllm.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # a shell that puts the tests in the background has them, and so this child, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
