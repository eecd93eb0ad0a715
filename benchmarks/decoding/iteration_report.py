"""Writes the records of iteration_cost.py and prefill.py into docs/performance.md.

python benchmarks/decoding/iteration_report.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite_page
from benchmarks.pages import record, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS = (
    "<!-- iteration: begin (written by benchmarks/decoding/iteration_report.py) -->",
    "<!-- iteration: end -->",
)
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def section(results: Path) -> str:
    iterations = _records(results, "iteration_cost")
    parts = [_iterations(iterations)] if iterations else []
    if prompts := _records(results, "prefill"):
        parts.append(_prompts(prompts))
    return "\n\n".join(parts) or "Nothing has been recorded yet."


def _records(results: Path, name: str) -> dict[str, dict[str, Any]]:
    """By the short name of the dtype."""
    found = {short: record(results, f"{name}_{dtype}") for dtype, short in _SHORT.items()}
    return {short: one for short, one in found.items() if one is not None}


def _links(found: dict[str, dict[str, Any]], name: str) -> str:
    links = [
        f"[{short}](../benchmarks/results/cpu/{name}_{one['dtype']}.json) of {one['date'][:10]}"
        for short, one in found.items()
    ]
    made = next(iter(found.values()))
    return (
        f"Records: {', '.join(links)}; {made['device']}, {made['threads']} threads, torch "
        f"{made['torch']}, transformers {made['transformers']}."
    )


def _iterations(found: dict[str, dict[str, Any]]) -> str:
    head = ["rows in the forward"]
    for short in found:
        head += [f"{short}: ms", "of one HuggingFace step"]
    rows = [["HuggingFace `generate`, 1"]]
    for one in found.values():
        rows[0] += [f"{one['huggingface_step_ms']['median']:.1f}", "1"]
    for size in next(iter(found.values()))["jacobi_iteration_ms"]:
        rows.append([f"Jacobi, {size}"])
        for one in found.values():
            rows[-1].append(f"{one['jacobi_iteration_ms'][size]['median']:.1f}")
            rows[-1].append(f"{one['ratio'][size]['median']:.2f}")

    def each(value: Any) -> str:
        """A number of every record, with the name of its dtype."""
        return " and ".join(f"{value(one)} ({short})" for short, one in found.items())

    def four(one: dict[str, Any]) -> str:
        times = one["jacobi_iteration_ms"]
        return f"{times['4']['median'] / times['1']['median']:.2f}"

    shares = [share for one in found.values() for share in one["overhead_share"].values()]
    batch = next(iter(found.values()))["batch"]
    return "\n".join(
        [
            _links(found, "iteration_cost"),
            "",
            *table(head, rows),
            "- Ratios are medians of per-round ratios, so they are not the quotient of the two "
            "medians beside them.",
            f"- Four rows cost {each(four)} times one.",
            "- Everything that is not the model's forward (masks, argmax, the fixed-point step, "
            f"the readback) takes {100 * min(shares):.1f} to {100 * max(shares):.1f} % of an "
            "iteration.",
            f"- A batch of {batch['batch_size']} makes "
            f"{each(lambda one: format(one['batch']['gain']['median'], '.2f'))} times the tokens/s "
            f"of single runs, at n = {batch['block_size']}.",
            "- torch's linear layers alone, timed in the same run with nothing around them, take "
            f"{each(lambda one: format(one['linear_layers_ms']['1'], '.1f'))} ms at one row; with "
            "weights laid out beforehand by oneDNN "
            f"{each(lambda one: format(one['linear_layers_prepacked_ms']['1'], '.1f'))} ms.",
        ]
    )


def _prompts(found: dict[str, dict[str, Any]]) -> str:
    head = ["tokens of the prompt"]
    for short in found:
        head += [f"{short}: ms", "model's own forward, ms", "ratio"]
    rows = []
    for lines in zip(*(one["prompts"] for one in found.values()), strict=True):
        rows.append([str(lines[0]["tokens"])])
        for line in lines:
            rows[-1] += [f"{line['native_ms']['median']:.0f}", f"{line['own_ms']['median']:.0f}"]
            rows[-1].append(f"{line['ratio']['median']:.2f}")
    return "\n".join(
        [
            "A prompt is read before the first iteration, in pieces of 128 rows through the same "
            "layers (`benchmarks/decoding/prefill.py`):",
            "",
            _links(found, "prefill"),
            "",
            *table(head, rows),
        ]
    ).rstrip()


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    rewrite_page(docs / "performance.md", MARKERS, section(results))


if __name__ == "__main__":
    main()
