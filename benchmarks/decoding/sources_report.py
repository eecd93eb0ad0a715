"""Writes the records of sources.py into docs/performance.md.

python benchmarks/decoding/sources_report.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite_page
from benchmarks.pages import record, source, table

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("guess_sources", "guess_sources_tiny_base", "guess_sources_tiny_cllm")
MARKERS = (
    "<!-- sources: begin (written by benchmarks/decoding/sources_report.py) -->",
    "<!-- sources: end -->",
)


def section(results: Path) -> str:
    parts = [one for one in (_part(results, name) for name in NAMES) if one is not None]
    return "\n\n".join(parts) or "Nothing has been recorded yet."


def _part(results: Path, name: str) -> str | None:
    found = record(results, name)
    if found is None:
        return None
    tasks: dict[str, Any] = found["tasks"]
    rows = []
    for guesses in dict.fromkeys(one for task in tasks.values() for one in task["sources"]):
        cells, same, texts = [], 0, 0
        for task in tasks.values():
            one = task["sources"].get(guesses)
            cells.append("" if one is None else f"{one['tokens_per_forward']:.2f}")
            if one is not None:
                same, texts = same + one["same"], texts + task["prompts"]
        rows.append([guesses, *cells, f"{same} of {texts}"])
    sizes = [
        f"{title}: {task['prompts']} prompts of up to {task['max_new_tokens']} tokens"
        for title, task in tasks.items()
    ]
    return "\n".join(
        [
            source(found, name),
            f"{found['model']}, fp32, n = {found['block_size']}; {'; '.join(sizes)}. Every forward "
            "counts but the prefill; texts are compared with those of the first line.",
            "",
            *table(["guesses", *tasks, "same texts"], rows),
        ]
    ).rstrip()


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    rewrite_page(docs / "performance.md", MARKERS, section(results))


if __name__ == "__main__":
    main()
