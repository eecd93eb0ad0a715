"""Writes the section of docs/performance.md on a large model's iterations from the records of
shape.py.

    python benchmarks/decoding/shape_report.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite_page
from benchmarks.pages import source, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS = (
    "<!-- shape: begin (written by benchmarks/decoding/shape_report.py) -->",
    "<!-- shape: end -->",
)


def section(results: Path) -> str:
    lines: list[str] = []
    for path in sorted(results.glob("*/shape_*.json")):
        lines += shape_section(json.loads(path.read_text()), path)
    return "\n".join(lines)


def shape_section(found: dict[str, Any], path: Path) -> list[str]:
    base, floor = found["sizes"]["1"], found["floor_ms"]
    rows = []
    for n, row in found["sizes"].items():
        forward = row["forward_ms"]["median"]
        rows.append([
            n,
            f"{forward:.2f}",
            f"{forward / base['forward_ms']['median']:.3f} x",
            f"{forward / floor:.2f} x",
            f"{row['iteration_ms']:.2f}",
            f"{row['iteration_ms'] / base['iteration_ms']:.3f} x",
            *host_time(row),
        ])  # fmt: skip
    head = ["n", "forward, ms", "of n = 1", "of the floor", "iteration, ms", "of n = 1"]
    head += ["host, us"] if "host_us" in base else []
    lines = [
        f"### The shape of {found['shape']}, {found['dtype']}, on {found['device']}",
        "",
        source(found, path.stem, folder=path.parent.name),
        f"Random weights, batch 1, {found['context']} tokens of context, CUDA graphs. "
        f"{found['weight_bytes'] / 2**30:.1f} GiB of weights at the most that was read in this run "
        f"take {floor:.2f} ms: the floor of a forward. A step of HuggingFace's `generate` takes "
        f"{found['huggingface_ms']:.1f} ms.",
        "",
        *table(head, rows),
    ]
    others = [
        [
            str(row["n"]),
            str(row["candidates"]),
            "" if row["rank"] is None else str(row["rank"]),
            str(row["rows"]),
            f"{row['iteration_ms']:.2f}",
            f"{row['iteration_ms'] / base['iteration_ms']:.3f} x",
            *host_time(row),
        ]
        for row in found.get("windows", [])  # older records have none
    ]
    if others:
        head = ["n", "candidates", "rank", "rows", "iteration, ms", "of n = 1"]
        head += ["host, us"] if "host_us" in found["windows"][0] else []
        lines += ["With a gated adapter of a rank, and over several candidates:", ""]
        lines += table(head, others)
    return lines


def host_time(row: dict[str, Any]) -> list[str]:
    """What the host does in an iteration, where that was measured."""
    return [f"{row['host_us']:.0f}"] if "host_us" in row else []


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    rewrite_page(docs / "performance.md", MARKERS, section(results))


if __name__ == "__main__":
    main()
