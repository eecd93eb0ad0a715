"""What `cllm collect` says at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.manifest import Manifest


def print_summary(manifest: Manifest, output: Path, seconds: float) -> None:
    """A table of the whole folder on standard output.

    Args:
        seconds: that this run took.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value, note in _lines(manifest, seconds):
        table.add_row(name, value, note)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{output} is ready to train on", markup=False, soft_wrap=True)


def _lines(manifest: Manifest, seconds: float) -> list[tuple[str, str, str]]:
    settings, statistics = manifest.settings, manifest.statistics
    counts = settings["counts"]
    rows = [
        ("prompts", f"{settings['prompts']:,}", ""),
        ("kept", f"{manifest.rows:,}", ""),
    ]
    rows += [("  dropped", f"{count:,}", reason) for reason, count in manifest.dropped.items()]
    if counts.get("near_ties"):
        note = "tokens that rounding chose, kept"
        rows.append(("near-ties", f"{counts['near_ties']:,}", note))
    if counts.get("mismatched"):
        share = counts["mismatched"] / counts["checked"]
        rows.append(("mismatch rate", f"{share:.1%}", "of the responses that were checked"))
    rows.append(("prompt tokens", f"{counts.get('prompt_tokens', 0):,}", ""))
    tokens = counts.get("response_tokens", 0)
    rows.append(("response tokens", f"{tokens:,}", f"{tokens / max(manifest.rows, 1):.0f} each"))
    rows += _trajectories(statistics, manifest.block_size)
    spent = settings["seconds"]
    work = sum(spent.values())
    if work:
        stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in spent.items())
        rows.append(("work", f"{work:.1f} s", stages))
        rows.append(("speed", f"{tokens / work:,.0f} tokens/s", "response tokens, per process"))
    rows.append(("this run", f"{seconds:.1f} s", ""))
    return rows


def _trajectories(statistics: dict[str, Any], block_size: int) -> list[tuple[str, str, str]]:
    return []
