"""Writes what training costs and gains into the pages, from the records.

    python benchmarks/training/report.py

Two sections between markers: docs/performance.md, the optimiser step and the collection; and
docs/results.md, quality and speed of trained models. No number is written that is not in a record.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite
from benchmarks.pages import percent, ratio, record, rounds, signed, source, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS = tuple(
    f"<!-- training: {text} -->"
    for text in ("begin (written by benchmarks/training/report.py)", "end")
)
_MIB = 2**20


def costs(results: Path) -> str:
    """One optimiser step, and the collection."""
    lines: list[str] = []
    step = record(results, "training_step_float32")
    if step is not None:
        lines += [
            "### One optimiser step",
            "",
            source(step, "training_step_float32", **rounds(step["lengths"][0])),
            f"{step['model']}, n = {step['block_size']}, one response, one state a block. "
            "The published algorithm runs three forwards a block with full logits.",
            "",
        ]
        rows = []
        for entry in step["lengths"]:
            for name, seconds in entry["seconds"].items():
                gain = entry["gain"].get(name)
                share = entry.get("peak_share", {}).get(name)
                peak = entry.get("peak_bytes", {}).get(name)
                tokens = entry["tokens_forwarded"][name.split(",")[0]]
                rows.append(
                    [
                        str(entry["length"]), name, f"{tokens:,.0f}", f"{seconds['median']:.2f} s",
                        "" if gain is None else ratio(gain),
                        "" if peak is None else f"{peak / _MIB:,.0f} MiB",
                        "" if share is None else percent(share),
                    ]
                )  # fmt: skip
        head = [
            "response",
            "",
            "tokens forwarded",
            "median",
            "faster",
            "peak beyond weights and optimiser",
            "of published",
        ]
        lines += [*table(head, rows), "![Training step](training_step_cpu.png)", ""]
    collection = record(results, "collection_float32")
    if collection is not None:
        lines += [
            "### Collecting trajectories",
            "",
            source(collection, "collection_float32", **rounds(collection)),
            f"{collection['model']}, responses of {collection['response_tokens']} tokens, "
            f"n = {collection['block_size']}.",
            "",
        ]
        rows = [
            [
                str(batch["responses"]),
                f"{batch['response_tokens_per_second']['block_parallel']:.1f}",
                f"{batch['response_tokens_per_second']['sequential']:.1f}",
                ratio(batch["gain_over"]["sequential"]),
            ]
            for batch in collection["batches"]
        ]
        head = ["responses", "block-parallel, tokens/s", "one block at a time", "faster"]
        lines += table(head, rows)
    return "\n".join(lines).rstrip() or "Nothing has been recorded yet."


def outcomes(results: Path, docs: Path) -> str:
    """Trained models: the trade-off, the longer run, held-out prompts."""
    lines: list[str] = []
    for name, title, picture in (
        ("cllm_tradeoff", "Teacher and AR weight", "training_tradeoff_cpu.png"),
        ("cllm_curves", "The longer run", "training_curve_cpu.png"),
        ("cllm_tiny", "From scratch: make train-tiny", "training_tiny_cpu.png"),
    ):
        found = record(results, name)
        if found is not None:
            lines += [f"### {title}", "", source(found, name), "", *curve_table(found), ""]
            if (docs / picture).exists():
                lines += [f"![{title}]({picture})", ""]
    held_out = record(results, "cllm_held_out")
    if held_out is not None:
        for task, result in held_out["tasks"].items():
            lines += task_section(held_out, task, result)
    pictures = [
        (alt, picture)
        for alt, picture in (
            ("SmolLM2 and its consistency LLM", "trajectory_base_cllm.png"),
            ("The tiny model and its consistency LLM", "trajectory_tiny.png"),
        )
        if (docs / picture).exists()
    ]
    if pictures:
        lines += ["### One text, iteration by iteration", ""]
        for alt, picture in pictures:
            lines += [f"{alt}: the first held-out prompt.", "", f"![{alt}]({picture})", ""]
    return "\n".join(lines).rstrip() or "Nothing has been recorded yet."


def curve_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, run in found["runs"].items():
        for point in run["evaluations"]:
            rows.append(
                [
                    name, f"{point['noisy_tokens']:,.0f}", f"{point['tokens_per_forward']:.3f}",
                    signed(point["nll_under_base"] - point["base_nll"]),
                    f"{percent(point['repetition'])} ({percent(point['base_repetition'])})",
                    percent(point["exact_match"]), percent(point["equal_leading"]),
                    "inside" if point["inside_bound"] else "outside",
                ]
            )  # fmt: skip
            name = ""
    head = [
        "run", "noisy tokens", "tokens per forward", "NLL beyond the base's", "repetition (base)",
        "same text", "same leading tokens", "quality bound",
    ]  # fmt: skip
    return table(head, rows)


def task_section(held_out: dict[str, Any], task: str, result: dict[str, Any]) -> list[str]:
    lines = [
        f"### {task}: {result['prompts']} held-out prompts, "
        f"at most {result['max_new_tokens']} tokens",
        "",
        source(held_out, "cllm_held_out") + f" n = {held_out['block_size']}.",
        "",
    ]
    rows = [
        [
            name, f"{found['tokens_per_forward']:.3f}", f"{found['fast_forwarded']:.1f}",
            f"{found['stationary']:.1f}", f"{found['nll_under_base']:.3f}",
            percent(found["repetition"]), percent(found["exact_match"]),
            percent(found["equal_leading"]), percent(found.get("answer_accuracy")),
        ]
        for name, found in result["models"].items()
    ]  # fmt: skip
    head = [
        "model", "tokens per forward", "fast-forwarded", "stationary", "NLL under the base",
        "repetition", "same text as the base", "same leading tokens", "right answers",
    ]  # fmt: skip
    lines += table(head, rows)
    if result.get("speed"):
        rows = [
            [
                name,
                f"{speed['tokens_per_second']['median']:.1f}",
                ratio(speed["ratio_to_huggingface_base"]),
            ]
            for name, speed in result["speed"].items()
        ]
        lines += [
            f"Prompt by prompt in turn, batch 1, n = {held_out['speed_block_size']}:",
            "",
            *table(["contender", "tokens/s", "of HuggingFace greedy, base (quartiles)"], rows),
        ]
    return lines


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    for page, text in (
        (docs / "performance.md", costs(results)),
        (docs / "results.md", outcomes(results, docs)),
    ):
        page.write_text(rewrite(page.read_text(), *MARKERS, text))
        print(page)


if __name__ == "__main__":
    main()
