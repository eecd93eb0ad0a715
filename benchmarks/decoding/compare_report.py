"""Writes the records of compare.py into docs/performance.md, with figures 5 and 6, and the README's
table.

    python benchmarks/decoding/compare_report.py

One section between markers, and two pictures a record: speed by task and contender (figure 5),
speed against memory (figure 6). No number is written that is not in a record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite
from benchmarks.pages import ratio, rounds, source, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS, README_MARKERS = (
    tuple(
        f"<!-- {name}: {text} -->"
        for text in ("begin (written by benchmarks/decoding/compare_report.py)", "end")
    )
    for name in ("decoding", "speed")
)
NAMES = (
    "compare_bfloat16",
    "compare_float32",
    "compare_float16",
    "compare_batches_bfloat16",
    "compare_tiny",
)
# Kou et al. 2024, arXiv 2403.00835: times one-token decoding of the same 7B weights, one A100 of
# 40 GB, batch 1. Untrained weights gain 1.0 to 1.1 there.
PAPER = {
    "gsm8k": {"CLLM": 3.0, "Medusa-2": 1.6},
    "humaneval": {"CLLM": 2.5, "Medusa-2": 3.2},
    "spider": {"CLLM": 3.4, "Medusa-2": 2.7},
    "mt_bench": {"CLLM": 2.4, "Medusa-2": 2.7},
}
# What the README shows of each dtype, and under which name.
DEFAULT = "cllm, looked up, pool"
README_ROWS = {
    "bfloat16": {
        "HuggingFace, compiled, static cache": "HuggingFace, static cache, compiled",
        "HuggingFace, prompt lookup": "HuggingFace, prompt lookup",
        "flashspec, prompt lookup": "flashspec, prompt lookup",
        "cllm, one token a forward": "cllm, one token",
        "cllm": DEFAULT,
        'cllm, `block_size="auto"`': "cllm, automatic",
        "cllm, 2 candidates": "cllm, looked up, pool, tree",
        "cllm, gated adapter": "cllm, adapter, looked up",
        'cllm, `block_size="auto"`, gated adapter': "cllm, adapter, automatic",
    },
    "float32": {
        "HuggingFace, compiled, static cache": "HuggingFace, static cache, compiled",
        "cllm": DEFAULT,
        "cllm, gated adapter": "cllm, adapter, looked up",
        'cllm, `block_size="auto"`, gated adapter': "cllm, adapter, automatic",
    },
}
TASKS = {"gsm8k": "GSM8K", "humaneval": "HumanEval", "spider": "Spider", "mt_bench": "MT-bench"}
_MIB = 2**20
_OURS, _THEIRS = "#0b6e4f", "#9aa5b1"


def contenders(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name to figures, in the order of the record."""
    return {name: value for name, value in task.items() if isinstance(value, dict)}


def readme_section(results: Path) -> str:
    """The README's table, of the CPU records at batch 1."""
    tasks: list[str] = []
    rows = []
    for dtype, names in README_ROWS.items():
        path = results / "cpu" / f"compare_{dtype}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())["batches"]["1"]
        tasks = tasks or list(found)
        short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        there = {label: name for label, name in names.items()
                 if all(name in found.get(task, {}) for task in tasks)}  # fmt: skip
        for place, (label, name) in enumerate(there.items()):
            mark = "**" if name == DEFAULT else ""
            cells = [found[task][name]["ratio"]["median"] for task in tasks]
            first = f"{short}: {label}" if place == 0 else label
            rows.append([f"{mark}{first}{mark}", *(f"{mark}{cell:.2f} x{mark}" for cell in cells)])
    if not rows:
        return "Nothing has been recorded yet."
    lines = table(["", *(TASKS.get(task, task) for task in tasks)], rows)
    return "\n".join(lines).rstrip()


def records(results: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Folder, name and record; a CPU's first."""
    folders = sorted(path.name for path in results.iterdir() if path.is_dir())
    for folder in sorted(folders, key=lambda name: name != "cpu"):
        for name in NAMES:
            path = results / folder / f"{name}.json"
            if path.exists():
                yield folder, name, json.loads(path.read_text())


def picture(folder: str, name: str) -> str:
    """What the names of a record's pictures end with."""
    return name if folder == "cpu" else f"{folder}_{name}"


def section(results: Path) -> str:
    """Every record's tables and pictures."""
    lines: list[str] = []
    for folder, name, found in records(results):
        lines += record_section(found, folder, name)
    return "\n".join(lines).rstrip() or "Nothing has been recorded yet."


def record_section(found: dict[str, Any], folder: str, name: str) -> list[str]:
    floor = found["floor"]
    sizes = list(found["batches"])
    every = " and ".join(filter(None, [", ".join(sizes[:-1]), sizes[-1]]))
    many = "" if sizes == ["1"] else f", batches of {every}"
    where = "" if folder == "cpu" else f", on {found['provenance']['device']}"
    ended = " The run was ended before its last task." if found.get("cut_off") else ""
    lines = [
        f"### {found['model']}, {found['dtype']}{many}{where}",
        "",
        source(found, name, folder=folder, **rounds(found)) + ended,
        "Every contender in a process of its own, batches in turn. "
        f"{floor['weight_bytes'] / _MIB:.0f} MiB of weights at "
        f"{floor['bytes_per_second'] / 1e9:.1f} GB/s, the most that was read in this run, take "
        f"{milliseconds(floor['seconds_per_forward'])} ms: the floor of a forward. Whole calls are "
        "timed, prefill and all.",
        "",
    ]
    for size, tasks in found["batches"].items():
        rows = []
        for task, result in tasks.items():
            for who, one in contenders(result).items():
                first = one["first_token"]
                rows.append(
                    [
                        task, who, ratio(one["ratio"]),
                        f"{one['tokens_per_second']['median']:.1f}",
                        f"{one['tokens_per_forward']:.2f}",
                        milliseconds(one["seconds_per_forward"]),
                        f"{100 * floor['seconds_per_forward'] / one['seconds_per_forward']:.0f} %",
                        "" if first is None else f"{1e3 * first['median']:.0f}",
                        f"{one['peak_bytes'] / _MIB:.0f}",
                        same(one),
                    ]
                )  # fmt: skip
        sizes = [f"{task}: {one['prompts']} prompts of up to {one['max_new_tokens']} tokens"
                 for task, one in tasks.items()]  # fmt: skip
        head = [
            "task", "contender", "tokens/s, of HuggingFace's (quartiles)", "tokens/s",
            "tokens per forward", "ms a forward", "floor's share of it", "first token, ms",
            "peak MiB", "texts of fp32 greedy search",
        ]  # fmt: skip
        lines += [f"Batch {size}; {'; '.join(sizes)}.", "", *table(head, rows)]
        if size == "1":
            lines += beside_the_paper(tasks)
    if found["absent"]:
        lines += ["Not taking part:", ""]
        lines += [f"- {who}: {reason}." for who, reason in found["absent"].items()]
        lines.append("")
    return [
        *lines,
        f"![Tokens per second by task](decoding_{picture(folder, name)}.png)",
        f"![Speed against memory](decoding_memory_{picture(folder, name)}.png)",
        "",
    ]


def milliseconds(seconds: float) -> str:
    """With three digits, or as many as stand before the point."""
    value = 1e3 * seconds
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def beside_the_paper(tasks: dict[str, Any]) -> list[str]:
    """The fastest of ours by task, and what the paper says of its own."""
    rows = []
    for task, result in tasks.items():
        ours = {name: one for name, one in contenders(result).items() if _ours(name)}
        if task not in PAPER or not ours:
            continue
        ratios = {name: one["ratio"]["median"] for name, one in ours.items()}
        best = max(ratios, key=lambda name: ratios[name])
        one_token = ratios.get("cllm, one token")
        rows.append([
            task, best, f"{ratios[best]:.2f} x",
            "" if one_token is None else f"{ratios[best] / one_token:.2f} x",
            *(f"{value:.1f} x" for value in PAPER[task].values()),
        ])  # fmt: skip
    if not rows:
        return []
    head = ["task", "fastest here", "of HuggingFace's", "of our own one-token decoding",
            "CLLM, its paper's number", "Medusa-2, the same paper's"]  # fmt: skip
    return [
        "Beside the numbers of the CLLM paper (arXiv 2403.00835): 7B weights on an A100, each "
        "beside one-token decoding of its own weights; its code model was trained on "
        "Code-search-Python. CLLM and Medusa-2 are trained for the task and their text is their "
        "own, here it is the base model's.",
        "",
        *table(head, rows),
    ]


def _ours(name: str) -> bool:
    return name.startswith("cllm")


def same(one: dict[str, Any]) -> str:
    """How many texts are fp32 greedy search's, and what the others are."""
    text = f"{one['same']} of {one['texts']}"
    others = one["texts"] - one["same"]
    if others:
        wrong = others - one["near_ties"]
        text += f" ({one['near_ties']} near-ties, {wrong} others)"
    return text


def draw_bars(found: dict[str, Any], path: Path) -> None:
    """Figure 5: a panel a task, a bar a contender, at batch 1 (or the smallest there is)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = next(iter(found["batches"].values()))
    names = list(dict.fromkeys(name for task in tasks.values() for name in contenders(task)))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(2.6 + 2.7 * len(tasks), 0.36 * len(names) + 1.5),
        sharey=True, layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, (task, result) in zip(axes[0], tasks.items(), strict=True):
        shown = contenders(result)
        values = [shown[name]["ratio"] if name in shown else None for name in names]
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                continue
            middle = value["median"]
            error = [[middle - value["low"]], [value["high"] - middle]]
            axis.barh(place, middle, color=_colour(name), xerr=error, ecolor="#555555", capsize=2)
            axis.text(value["high"], place, f" {middle:.2f}", va="center", fontsize=8)
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.set_title(task, fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    size = next(iter(found["batches"]))
    figure.supxlabel(
        "tokens a second, of HuggingFace's greedy search (median, quartiles)", fontsize=9
    )
    figure.suptitle(
        f"{found['model']}, {found['dtype']}, batch {size}, {found['provenance']['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw_memory(found: dict[str, Any], path: Path) -> None:
    """Figure 6: tokens per second over all tasks against peak memory, at batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = next(iter(found["batches"].values()))
    whole = set.intersection(*(set(contenders(task)) for task in tasks.values()))
    names = [name for name in contenders(next(iter(tasks.values()))) if name in whole]
    figure, axis = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    points = []
    for name in names:
        entries = [task[name] for task in tasks.values()]
        speeds = [one["tokens_per_second"]["median"] for one in entries]
        memory = max(one["peak_bytes"] for one in entries) / _MIB
        points.append((memory, len(speeds) / sum(1 / speed for speed in speeds), name))
    # labels from the top down, none on another
    points.sort(key=lambda point: -point[1])
    highest, lowest = points[0][1], points[-1][1]
    step = max((highest - lowest) / max(1, len(points) - 1), 1e-9)
    right = max(point[0] for point in points)
    left = min(point[0] for point in points)
    edge = right + 0.12 * max(right - left, 1)
    for place, (memory, speed, name) in enumerate(points):
        axis.plot(memory, speed, "o", color=_colour(name), markersize=8)
        axis.annotate(
            name, (memory, speed), xytext=(edge, highest - place * step), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7},
        )  # fmt: skip
    axis.set_xlim(left - 0.08 * max(right - left, 1), edge + 0.9 * max(right - left, 1))
    axis.set_xlabel("peak memory of the process, MiB")
    axis.set_ylabel("tokens a second, harmonic mean over the tasks")
    size = next(iter(found["batches"]))
    axis.set_title(f"{found['model']}, {found['dtype']}, batch {size}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _colour(name: str) -> str:
    return _OURS if "cllm" in name.lower() else _THEIRS


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    page, readme = docs / "performance.md", docs.parent / "README.md"
    page.write_text(rewrite(page.read_text(), *MARKERS, section(results)))
    readme.write_text(rewrite(readme.read_text(), *README_MARKERS, readme_section(results)))
    print(page, readme)
    for folder, name, found in records(results):
        draw_bars(found, docs / f"decoding_{picture(folder, name)}.png")
        draw_memory(found, docs / f"decoding_memory_{picture(folder, name)}.png")


if __name__ == "__main__":
    main()
