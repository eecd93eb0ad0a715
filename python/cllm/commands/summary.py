"""What `cllm collect` says at the end."""

from __future__ import annotations

from pathlib import Path

from ..training.collect.statistics import CollectionStatistics
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
    settings = manifest.settings
    counts, spent = settings["counts"], settings["seconds"]
    figures = CollectionStatistics.from_json(manifest.statistics)
    rows = [
        ("prompts", f"{settings['prompts']:,}", ""),
        ("kept", f"{manifest.rows:,}", ""),
    ]
    rows += [("  dropped", f"{count:,}", reason) for reason, count in manifest.dropped.items()]
    if counts.get("mismatched"):
        share = counts["mismatched"] / counts["checked"]
        rows.append(("mismatch rate", f"{share:.1%}", "of the responses that were checked"))
    if figures.mismatches:
        note = "tokens that rounding chose, within the tolerance"
        rows.append(("near-ties", f"{figures.mismatches:,}", note))
    each = figures.response_tokens / max(figures.responses, 1)
    rows += [
        ("response tokens", f"{figures.response_tokens:,}", f"{each:.0f} a response"),
        ("trajectories", f"{figures.blocks:,}", f"blocks of {manifest.block_size} tokens"),
        ("states", f"{figures.states:,}", f"{figures.state_tokens:,} tokens"),
        ("trajectory length", f"{figures.iterations_per_block:.2f}", "forward passes a block"),
        ("tokens per forward", f"{figures.tokens_per_forward:.2f}", "decoding block by block"),
        ("fast-forwarded", f"{figures.fast_forwarded:,}", "tokens confirmed beyond one a forward"),
        ("stationary", f"{figures.stationary:,}", "tokens right behind a wrong one, and staying"),
    ]
    work = sum(spent.values())
    if work:
        speed = figures.response_tokens / work
        stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in spent.items())
        rows.append(("tokens/s", f"{speed:,.1f}", "response tokens, in one process"))
        rows.append(("work", _duration(work), stages))
    rows.append(("this run", _duration(seconds), ""))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
