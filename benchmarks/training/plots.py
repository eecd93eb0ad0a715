"""A record of step.py as a picture: speed, peak memory and tokens forwarded by response length.

python benchmarks/training/plots.py benchmarks/results/cpu/training_step_float32.json step.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"packed": "#0b6e4f", "packed, checkpointed": "#6fb59a", "published": "#9aa5b1"}
LABELS = {
    "packed": "packed and fused (cllm)",
    "packed, checkpointed": "the same, gradient checkpointing",
    "published": "published: three forwards a block",
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the record's picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    entries = record["lengths"]
    panels = [
        ("responses a second (longer is better)", "responses_per_second", "{:.3g}", 1.0),
        ("tokens forwarded a response", "tokens_forwarded", "{:,.0f}", 1.0),
    ]
    if all("peak_bytes" in entry for entry in entries):
        panels.insert(1, ("peak memory of a step, GiB", "peak_bytes", "{:.2f}", 1 / 2**30))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 0.75 * len(entries) + 2.0), layout="constrained"
    )
    for axis, (title, field, form, unit) in zip(axes, panels, strict=True):
        bars_of(axis, entries, title, field, form, unit)
    figure.suptitle(
        f"One optimiser step on a response: {record['model']}, {record['dtype']}, "
        f"n = {record['block_size']}, {record['device']}",
        fontsize=12,
    )
    figure.legend(
        handles=[Patch(color=colour, label=LABELS[name]) for name, colour in COLOURS.items()],
        loc="outside lower center",
        ncols=len(COLOURS),
        frameon=False,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def bars_of(
    axis: Any, entries: list[dict[str, Any]], title: str, field: str, form: str, unit: float
) -> None:
    """One group of bars a length, from zero, the shortest response on top."""
    names = [name for name in COLOURS if name in entries[0][field]]
    height = 0.8 / len(names)
    largest = max(entry[field][name] * unit for entry in entries for name in names)
    for group, entry in enumerate(entries):
        theirs = entry[field]["published"]
        for number, name in enumerate(names):
            value = entry[field][name]
            place = group + (number - (len(names) - 1) / 2) * height
            axis.barh(place, value * unit, height * 0.9, color=COLOURS[name])
            text = form.format(value * unit)
            if name in entry["gain"] and field == "responses_per_second":
                text += f"  ({entry['gain'][name]['median']:.1f} x)"
            elif name != "published" and value:
                text += f"  (1 / {theirs / value:.1f})"
            axis.annotate(
                text, (value * unit, place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axis.set_xlim(0, largest * 1.45)
    axis.set_yticks(range(len(entries)), [f"{entry['length']} tokens" for entry in entries])
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
