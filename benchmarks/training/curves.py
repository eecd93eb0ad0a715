"""How do speed and quality move while a consistency LLM is trained?

Reads the evaluations that `cllm train` logged into its output folders, writes them as one record
and draws them: tokens per forward against noisy tokens trained, and against what the text lost in
likelihood under the base model.

    python benchmarks/training/curves.py --run "self, AR 10=runs/self-10" \
        --run "base, AR 1=runs/base-1" --record cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import RESULTS, provenance, write_record

NAME = "cllm_curves"
POINT = (
    "tokens_per_forward", "nll_under_base", "base_nll", "repetition", "base_repetition",
    "exact_match", "equal_leading", "mean_length", "inside_bound",
)  # fmt: skip
SETTINGS = (
    "teacher", "ar_weight", "learning_rate", "lora_r", "consistency", "divergence", "sampling",
    "max_nll_increase", "seed",
)  # fmt: skip


def read_run(folder: Path) -> dict[str, Any]:
    """Settings and evaluations of one run.

    Raises:
        SystemExit: if the folder holds no finished run with evaluations.
    """
    try:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        recipe = json.loads((folder / "cllm_recipe.json").read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"{folder} is no folder of a finished cllm train: {error}") from error
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        if "eval_tokens_per_forward" in entry:
            point = {name: entry[f"eval_{name}"] for name in POINT if f"eval_{name}" in entry}
            points[entry["step"]] = {
                "step": entry["step"],
                "noisy_tokens": entry["eval_noisy_tokens"],
                **point,
            }
    if not points:
        raise SystemExit(f"{folder} logged no evaluation; train with --eval-prompts")
    losses = [
        {name: entry[name] for name in ("step", "loss", "consistency_loss", "ar_loss")}
        for entry in history
        if "consistency_loss" in entry
    ]
    arguments = recipe["arguments"]
    return {
        "settings": {name: arguments.get(name) for name in SETTINGS},
        "trained": recipe["trained"],
        "seconds": sum(entry.get("train_runtime", 0.0) for entry in history),
        "evaluations": [points[step] for step in sorted(points)],
        "losses": losses,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Two panels: speed against tokens trained, and speed against likelihood lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    bound = 0.0
    for number, (name, run) in enumerate(record["runs"].items()):
        points = run["evaluations"]
        colour = colours[number % len(colours)]
        tokens = [point["noisy_tokens"] / 1000 for point in points]
        speed = [point["tokens_per_forward"] for point in points]
        lost = [point["nll_under_base"] - point["base_nll"] for point in points]
        inside = [bool(point["inside_bound"]) for point in points]
        bound = max(bound, run["settings"]["max_nll_increase"] or 0.0)
        for axis, across in ((left, tokens), (right, lost)):
            axis.plot(across, speed, color=colour, linewidth=1.4, label=name)
            for good, marker in ((True, "o"), (False, "x")):
                chosen = [i for i, flag in enumerate(inside) if flag == good]
                axis.plot(
                    [across[i] for i in chosen], [speed[i] for i in chosen],
                    marker, color=colour, markersize=5,
                )  # fmt: skip
    left.set_xlabel("noisy tokens trained, thousands")
    left.set_ylabel("tokens per forward, held-out prompts")
    right.set_xlabel("likelihood lost: nats a token under the base, beside the base's own text")
    right.axvline(bound, color="#444444", linewidth=0.8, linestyle="--")
    right.annotate(
        "quality bound", (bound, 0.02), xycoords=("data", "axes fraction"),
        xytext=(4, 0), textcoords="offset points", fontsize=8, color="#444444",
    )  # fmt: skip
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False
    )
    figure.suptitle(
        "Training a consistency LLM: circles lie inside the quality bound, crosses outside"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--name", default=NAME, help="the record's name")
    options = parser.parse_args()
    if options.run:
        runs = dict(entry.rsplit("=", 1) for entry in options.run)
        record = {
            "provenance": provenance("cpu"),
            "runs": {name: read_run(Path(folder)) for name, folder in runs.items()},
        }
        if options.record:
            write_record(record, options.record, options.name)
    elif options.record:
        record = json.loads((RESULTS / options.record / f"{options.name}.json").read_text())
    else:
        raise SystemExit("give runs, or a record to draw")
    if options.plot:
        draw(record, options.plot)


if __name__ == "__main__":
    main()
