"""What the pages that are written from records share: records, their source, tables, numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(results: Path, name: str) -> dict[str, Any] | None:
    """A CPU record, None where there is none."""
    path = results / "cpu" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(one: dict[str, Any], name: str, *, folder: str = "cpu", **more: Any) -> str:
    """Where the numbers of a table come from."""
    made = one.get("provenance", one)
    threads = f"{made['threads']} thread{'' if made['threads'] == 1 else 's'}"
    extra = "".join(f", {value} {key}" for key, value in more.items())
    return (
        f"[Record](../benchmarks/results/{folder}/{name}.json) of {made['date'][:10]}: "
        f"{made['device']}, {threads}, torch {made['torch']}, "
        f"transformers {made['transformers']}{extra}."
    )


def rounds(one: dict[str, Any]) -> dict[str, int]:
    return {"round" if one["rounds"] == 1 else "rounds": one["rounds"]}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} x ({value['low']:.2f} - {value['high']:.2f})"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.3f}"
