"""Writes what the gated adapter gains and costs into docs/results.md, from the records.

    python benchmarks/adapter/report.py

One section between markers. No number is written that is not in a record.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import RESULTS, rewrite_page
from benchmarks.pages import percent, ratio, record, source, table

DOCS = Path(__file__).parents[2] / "docs"
MARKERS = tuple(
    f"<!-- adapter: {text} -->"
    for text in ("begin (written by benchmarks/adapter/report.py)", "end")
)
CURVE = "adapter_curve"  # of benchmarks/training/curves.py
ABLATION = "adapter_ablation"  # the same, a run for each choice
TRAINING = "adapter_training_cost"
_MIB = 2**20
_DTYPES = ("float32", "bfloat16", "float16")


def section(results: Path) -> str:
    """Held-out prompts, then the training, then the gate's cost."""
    lines: list[str] = []
    held_out = record(results, "adapter_held_out")
    if held_out is not None:
        lines += held_out_section(held_out)
    curve = record(results, CURVE)
    if curve is not None:
        lines += training_section(curve)
    ablation = record(results, ABLATION)
    if ablation is not None:
        lines += ablation_section(ablation)
    training = record(results, TRAINING)
    if training is not None:
        lines += training_cost_section(training)
    costs = {dtype: record(results, f"gate_cost_{dtype}") for dtype in _DTYPES}
    lines += cost_section({dtype: one for dtype, one in costs.items() if one is not None})
    return "\n".join(lines).rstrip() or "Nothing has been recorded yet."


def window(sizes: dict[str, Any] | None) -> str:
    if sizes is None:
        return ""
    verify = sizes["verify_size"]
    return f"n = {sizes['block_size']}" + ("" if verify is None else f", v = {verify}")


def same(found: dict[str, Any]) -> str:
    """How many texts equal HuggingFace's, and what the others are."""
    equal = found["texts"] - found["mismatches"]
    text = f"{equal} of {found['texts']}"
    if found["mismatches"]:
        wrong = found["mismatches"] - found["near_ties"]
        text += f" ({found['near_ties']} near-ties, {wrong} wrong)"
    return text


def held_out_section(found: dict[str, Any]) -> list[str]:
    adapter = found["adapter"]
    ranks = ", ".join(map(str, adapter["ranks"]))
    lines = [
        "### Held-out prompts, with the adapter and without",
        "",
        source(found, "adapter_held_out"),
        f"{found['base']}, adapter of rank {ranks}, {adapter['parameters']:,} parameters.",
        "",
        f"Forwards counted in fp32, {window(found['window'])} (plain: n alone), every one but the "
        "prefill. Texts beside those of HuggingFace's greedy search of the base, one prompt at a "
        "time, token for token; of one that differs, `cllm.verify` says whether a near-tie "
        "explains it. Looked up: guesses from the text, and without the adapter from the pool of "
        "earlier predictions.",
        "",
    ]
    rows = [
        [
            task, str(result["prompts"]), str(result["max_new_tokens"]), name,
            f"{counted['tokens_per_forward']:.3f}",
            same(counted) if "texts" in counted else "",
        ]
        for task, result in found["tasks"].items()
        for name, counted in result["counted"].items()
    ]  # fmt: skip
    head = ["task", "prompts", "most tokens", "", "tokens per forward", "same text, fp32"]
    lines += table(head, rows)
    dtypes = [dtype for dtype in _DTYPES if dtype in found["sizes"]]
    for dtype in dtypes:
        rows = [
            [
                task, name, window(speed["window"]), f"{speed['tokens_per_forward']:.3f}",
                f"{speed['tokens_per_second']['median']:.1f}",
                ratio(speed["ratio_to_huggingface"]), same(speed),
            ]
            for task, result in found["tasks"].items()
            for name, speed in result["speed"][dtype].items()
        ]  # fmt: skip
        timed = max(
            speed["texts"]
            for result in found["tasks"].values()
            for speed in result["speed"][dtype].values()
        )
        head = [
            "task", "contender", "window", "tokens per forward", "tokens/s",
            "of HuggingFace greedy (quartiles)", "same text",
        ]  # fmt: skip
        lines += [
            f"Against the clock in {dtype}, the first {timed} prompts of a task, one by one in "
            "turn, batch 1, with guesses looked up in the text, at the sizes that `cllm tune` "
            "found on a few of these prompts:",
            "",
            *table(head, rows),
        ]
    return lines


def training_section(found: dict[str, Any]) -> list[str]:
    """Tokens per forward by tokens trained, and what the run took."""
    lines = ["### What its training takes", "", source(found, CURVE)]
    rows = []
    for name, run in found["runs"].items():
        settings = run["settings"]
        lines.append(
            f"{name}: learning rate {settings['learning_rate']:g}, sampling "
            f"{settings['sampling']}, {settings['divergence']}."
        )
        rows += [
            [
                name, str(point["step"]), f"{point['noisy_tokens']:,.0f}",
                f"{point['tokens_per_forward']:.2f}", percent(point["exact_match"]),
            ]
            for point in run["evaluations"]
        ]  # fmt: skip
    head = ["run", "step", "noisy tokens", "tokens per forward", "text equal to the base's"]
    return [
        *lines,
        "",
        "Tokens per forward of the trainer's own few held-out prompts, with nothing looked up:",
        "",
        *table(head, rows),
    ]


def ablation_section(found: dict[str, Any]) -> list[str]:
    """What one choice does to the last evaluation of a short run."""
    rows = []
    for name, run in found["runs"].items():
        settings, point = run["settings"], run["evaluations"][-1]
        rows.append(
            [
                name, settings["divergence"], str(settings["lora_r"]), settings["sampling"],
                f"{point['noisy_tokens']:,.0f}", f"{point['tokens_per_forward']:.2f}",
            ]
        )  # fmt: skip
    head = ["run", "divergence", "rank", "sampling", "noisy tokens", "tokens per forward"]
    return [
        "### One choice at a time",
        "",
        source(found, ABLATION),
        "Short runs from a new adapter, alike but for what the first column says; tokens per "
        "forward of the trainer's own few held-out prompts at the end, with nothing looked up.",
        "",
        *table(head, rows),
    ]


def training_cost_section(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, run in found["runs"].items():
        rows.append(
            [
                name, f"{run['seconds'] / run['steps']:.2f} s",
                f"{run['noisy_tokens'] / run['seconds']:,.0f}",
                f"{run['peak_bytes'] / 2**30:.2f} GiB",
            ]
        )  # fmt: skip
    head = ["trained", "a step", "noisy tokens a second", "most memory of the process"]
    return [
        "### Beside training the whole model",
        "",
        source(found, TRAINING)
        + f" {found['base']}, {found['dtype']}, {next(iter(found['runs'].values()))['steps']} "
        "steps of one response each. The noisy states differ: those of the adapter are windows "
        "that it visits, those of the whole model one state of every block.",
        "",
        *table(head, rows),
    ]


def cost_section(costs: dict[str, dict[str, Any]]) -> list[str]:
    if not costs:
        return []
    lines = ["### What the gate costs", ""]
    rows = []
    for dtype, found in costs.items():
        ranks = ", ".join(map(str, found["ranks"]))
        lines.append(
            source(found, f"gate_cost_{dtype}", rounds=found["rounds"])
            + f" {found['base']}, {dtype}, rank {ranks} on {found['modules']} modules, "
            f"{found['context']} tokens in the cache."
        )
        for entry in found["sizes"]:
            milliseconds = entry["milliseconds"]
            rows.append(
                [
                    dtype, f"{entry['rows'] // 2}", f"{milliseconds['plain']['median']:.1f} ms",
                    f"{milliseconds['gated']['median']:.1f} ms", ratio(entry["ratio"]["twice"]),
                    ratio(entry["ratio"]["gated"]),
                ]
            )  # fmt: skip
    head = [
        "dtype", "n = v", "plain, 2n rows", "gated, n + n rows",
        "window twice, no adapter (quartiles)", "gated (quartiles)",
    ]  # fmt: skip
    lines += ["", *table(head, rows)]
    memory_rows = []
    for dtype, found in costs.items():
        memory = found["memory"]
        plain, gated = memory["cache"]["plain"], memory["cache"]["gated"]
        memory_rows.append(
            [
                dtype, f"{memory['base_bytes'] / _MIB:.1f} MiB",
                f"{memory['adapter_bytes'] / _MIB:.1f} MiB",
                f"{memory['adapter_bytes_while_decoding'] / _MIB:.1f} MiB",
                f"{gated['slots'] - plain['slots']} of {gated['slots']}",
                f"{(gated['slots'] - plain['slots']) * gated['bytes_per_slot'] / _MIB:.2f} MiB",
                f"{(gated['allocated_bytes'] - plain['allocated_bytes']) / _MIB:.2f} MiB",
            ]
        )  # fmt: skip
    head = [
        "dtype", "base", "adapter", "its copy while decoding", "cache slots of one more window",
        "their size", "allocated beyond plain decoding",
    ]  # fmt: skip
    return [*lines, f"Memory, n = v = {next(iter(costs.values()))['memory']['n']}:", "",
            *table(head, memory_rows)]  # fmt: skip


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    rewrite_page(docs / "results.md", MARKERS, section(results))


if __name__ == "__main__":
    main()
