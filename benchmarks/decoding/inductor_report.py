"""Writes the records of inductor.py into docs/performance.md.

python benchmarks/decoding/inductor_report.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.decoding.inductor import won_back
from benchmarks.harness import RESULTS, rewrite_page
from benchmarks.pages import ratio, record, source, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS = (
    "<!-- inductor: begin (written by benchmarks/decoding/inductor_report.py) -->",
    "<!-- inductor: end -->",
)
HEAD = [
    "shape, random weights", "n", "HuggingFace, a step", "iteration", "compiled",
    "faster (quartiles)", "compiling", "won back after iterations",
]  # fmt: skip


def row(name: str, one: dict[str, Any]) -> list[str]:
    ms = [f"{1e3 * one['seconds'][key]['median']:.1f} ms" for key in ("huggingface", "off")]
    return [
        name, str(one["n"]), *ms, f"{1e3 * one['seconds']['inductor']['median']:.1f} ms",
        ratio(one["speedup"]), f"{one['compile_seconds']:.0f} s",
        won_back(one),
    ]  # fmt: skip


def section(results: Path) -> str:
    lines = []
    for dtype in ("float32", "bfloat16"):
        found = record(results, f"inductor_{dtype}")
        if found is None:
            continue
        rows = [row(name, one) for name, ones in found["models"].items() for one in ones]
        context = f"batch 1, {found['context']} tokens of context, whole calls in turn"
        lines += [
            f"{source(found, f'inductor_{dtype}')} {dtype}, {context}.",
            "",
            *table(HEAD, rows),
        ]
    return "\n".join(lines).rstrip() or "Nothing has been recorded yet."


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    rewrite_page(docs / "performance.md", MARKERS, section(results))


if __name__ == "__main__":
    main()
