"""A record on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def size_text(count: float | None) -> str:
    """Bytes as a person reads them."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def time_text(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{1e3 * milliseconds:.2f} us"
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:.0f} ms"


def show(record: dict[str, Any]) -> None:
    console = Console(width=max(120, Console().width))
    ceiling = record["ceilings"]
    rates = ", ".join(
        f"{dtype} {rate / 1e9:.4g} GFLOP/s"
        for dtype, rate in ceiling["matmul_flop_per_second"].items()
    )
    console.print(
        f"{record['op']} on {record['device']}: copy {ceiling['copy_bytes_per_second'] / 1e9:.4g} "
        f"GB/s, matmul {rates}, default backend {record['default_backend']}"
    )
    for case in record["cases"]:
        table = Table(title=f"{case['case']} ({case['rounds']} rounds)", title_justify="left")
        for column in ("variant", "median", "quartiles", "x auto", "x matmuls", "floor", "memory"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        others = []
        for entry in case["variants"]:
            if entry["status"] != "measured":
                others.append(f"  {entry['name']}: {entry['status']}: {entry['reason']}")
                continue
            time = entry["ms"]
            table.add_row(
                entry["name"],
                time_text(time["median"]),
                f"{time_text(time['low'])} - {time_text(time['high'])}",
                *(
                    f"{entry[name]['median']:.3f}" if name in entry else ""
                    for name in ("times_auto", "times_matmuls")
                ),
                f"{100 * entry['share']['floor']:.1f} %",
                size_text(entry.get("peak_bytes_beyond_results")),
            )
        console.print(table)
        for line in others:
            console.print(line, markup=False, highlight=False)
