"""A record as a picture: one panel per case, one bar per variant, quartiles as whiskers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels.show import size_text, time_text

COLOURS = {"cllm": "#0b6e4f", "baseline": "#9aa5b1", "matmuls": "#d9a441"}
LABELS = {"cllm": "cllm_kernels", "baseline": "alternatives", "matmuls": "matmuls alone"}
COLUMNS = 2
FAR = 12  # a factor between times that a linear axis still shows


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the record's picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    cases = [case for case in record["cases"] if any("ms" in one for one in case["variants"])]
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    bars = max(sum("ms" in one for one in case["variants"]) for case in cases)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(7 * columns, rows * (0.34 * bars + 1.1) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for panel, case in zip(panels, cases, strict=False):
        bars_of(panel, case)
    for panel in panels[len(cases) :]:
        panel.set_axis_off()
    figure.suptitle(f"{record['op']} on {record['device']}: shorter is better", fontsize=13)
    figure.legend(
        handles=[Patch(color=colour, label=LABELS[kind]) for kind, colour in COLOURS.items()],
        loc="outside lower center",
        ncols=len(COLOURS),
        frameon=False,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def bars_of(panel: Any, case: dict[str, Any]) -> None:
    """Median times, from zero, or on a logarithmic axis where they lie far apart."""
    entries = [entry for entry in case["variants"] if "ms" in entry]
    entries.sort(key=lambda entry: entry["ms"]["median"], reverse=True)
    times = [entry["ms"]["median"] for entry in entries]
    whiskers = [
        [entry["ms"]["median"] - entry["ms"]["low"] for entry in entries],
        [entry["ms"]["high"] - entry["ms"]["median"] for entry in entries],
    ]
    places = range(len(entries))
    panel.barh(
        places,
        times,
        xerr=whiskers,
        color=[COLOURS[entry["kind"]] for entry in entries],
        error_kw={"elinewidth": 1, "ecolor": "#333333"},
        height=0.72,
    )
    longest = max(entry["ms"]["high"] for entry in entries)
    if longest > FAR * min(times):
        panel.set_xscale("log")
        panel.set_xlim(min(times) / 2.5, longest * 6)
    else:
        panel.set_xlim(0, longest * 1.35)
    panel.set_yticks(places, [entry["name"] for entry in entries], fontsize=8)
    panel.set_xlabel("milliseconds", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(case["case"], fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    for place, entry in zip(places, entries, strict=True):
        memory = entry.get("peak_bytes_beyond_results")
        text = time_text(entry["ms"]["median"])
        if memory is not None:
            text += f", {size_text(memory)}"
        panel.annotate(
            text,
            (entry["ms"]["high"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
