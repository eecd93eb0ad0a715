"""Draws the plots and rewrites the kernels section of docs/performance.md, from the records.

    python benchmarks/kernels/report.py

One picture per op and device, docs/kernels_<device>_<op>.png. The section stands between two
markers; nothing else on the page is touched, and no number is written that is not in a record.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite
from benchmarks.kernels.plots import draw
from benchmarks.kernels.run_all import OPS
from benchmarks.kernels.show import size_text, time_text

DOCS = Path(__file__).parents[2] / "docs"
BEGIN = "<!-- kernels: begin (written by benchmarks/kernels/report.py) -->"
END = "<!-- kernels: end -->"
NO_GPU = "Nothing here has been measured on a GPU."
NOTHING = f"No kernel has been recorded yet. {NO_GPU}"


def records(results: Path) -> list[dict[str, Any]]:
    """All kernel records that are not of --quick runs, CPUs first, ops in order."""
    found = []
    for path in results.glob("*/kernels_*.json"):
        record = json.loads(path.read_text())
        if not record["quick"]:
            found.append({**record, "path": path, "folder": path.parent.name})
    order = {op: number for number, op in enumerate(OPS)}
    return sorted(
        found, key=lambda one: (one["device_type"] != "cpu", one["folder"], order[one["op"]])
    )


def measured(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in case["variants"] if entry["status"] == "measured"}


def section(found: list[dict[str, Any]], docs: Path) -> str:
    """The text between the markers."""
    if not found:
        return NOTHING
    lines = []
    if all(record["device_type"] == "cpu" for record in found):
        lines += [NO_GPU, ""]
    lines += [
        "Variants are timed in turn on the same inputs; ratios are medians of per-round ratios.",
        "Memory is the peak beyond inputs and results. The share of the floor is the time that the",
        "measured copy bandwidth and matmul rate would need, divided by the time taken.",
        "",
    ]
    for folder in dict.fromkeys(record["folder"] for record in found):
        of_device = [record for record in found if record["folder"] == folder]
        lines += defaults_table(of_device)
        for record in of_device:
            lines += op_section(record, docs)
    return "\n".join(lines).rstrip()


def defaults_table(of_device: list[dict[str, Any]]) -> list[str]:
    """Which backend is the default, and what each of the others takes in its place."""
    first = of_device[0]
    lines = [
        f"### {first['device']}: the default backend per op and shape",
        "",
        "Times of the others are in multiples of the default's.",
        "",
        "| op | shape | default | others |",
        "|---|---|---|---|",
    ]
    for record in of_device:
        for case in record["cases"]:
            ran = measured(case)
            default = record["default_backend"]
            others = [
                f"{entry['backend']} {entry['times_auto']['median']:.2f} x"
                for name, entry in ran.items()
                if name == f"cllm {entry['backend']}" and entry["backend"] not in ("auto", default)
            ]
            lines.append(
                f"| {record['op']} | {case['case']} | {default} | {', '.join(others) or '-'} |"
            )
    return [*lines, ""]


def op_section(record: dict[str, Any], docs: Path) -> list[str]:
    picture = f"kernels_{record['folder']}_{record['op']}.png"
    draw(record, docs / picture)
    ceiling = record["ceilings"]
    rates = ", ".join(
        f"{dtype} matmul {rate / 1e12:.3g} TFLOP/s"
        for dtype, rate in ceiling["matmul_flop_per_second"].items()
    )
    path = f"../benchmarks/results/{record['folder']}/{record['path'].name}"
    lines = [
        f"### {record['op']} on {record['device']}",
        "",
        f"[Record]({path}) of {record['date'][:10]}, torch {record['torch']}, "
        f"{record['threads']} threads; copy {ceiling['copy_bytes_per_second'] / 1e9:.3g} GB/s, "
        f"{rates}.",
        "",
        f"![{record['op']}, {record['device']}]({picture})",
        "",
        "| case | variant | median (quartiles) | of ours | of matmuls | of the floor | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        label = case["case"]
        for entry in case["variants"]:
            lines.append(f"| {label} | {row(entry)} |")
            label = ""
    return [*lines, ""]


def row(entry: dict[str, Any]) -> str:
    if entry["status"] != "measured":
        reason = " ".join(entry["reason"].split()).replace("|", "\\|")[:160]
        return f"{entry['name']} | {entry['status']}: {reason} | | | |"
    time = entry["ms"]
    ratios = [
        f"{entry[name]['median']:.2f} x" if name in entry else ""
        for name in ("times_auto", "times_matmuls")
    ]
    memory = entry.get("peak_bytes_beyond_results")
    return " | ".join(
        [
            entry["name"],
            f"{time_text(time['median'])} ({time_text(time['low'])} - {time_text(time['high'])})",
            *ratios,
            f"{100 * entry['share']['floor']:.0f} %",
            "" if memory is None else size_text(memory),
        ]
    )


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    page = docs / "performance.md"
    found = records(results)
    page.write_text(rewrite(page.read_text(), BEGIN, END, section(found, docs)))
    print(f"{page}: {len(found)} records")


if __name__ == "__main__":
    main()
