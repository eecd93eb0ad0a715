"""What every benchmark shares: provenance, statistics and the record on disk."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def load(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer; None: the demo's model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name is None:
        from cllm.default_model import ensure_converted

        name = str(ensure_converted())
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def provenance(device: str) -> dict[str, Any]:
    """Where and with what a record was made."""
    import transformers

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = _cpu_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    # a copy of the tree has no history, or another's; whoever made it may say which commit it is
    commit = os.environ.get("SOURCE_COMMIT", commit)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, which never lie beyond the values."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return {"median": ordered[0], "low": ordered[0], "high": ordered[0]}
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def write_record(record: dict[str, Any], folder: str, name: str) -> Path:
    """Write ``results/<folder>/<name>.json`` and return its path."""
    path = RESULTS / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def rewrite_page(page: Path, markers: tuple[str, ...], text: str) -> None:
    """`rewrite` a file, and say which."""
    page.write_text(rewrite(page.read_text(), *markers, text))
    print(page)


def rewrite(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between its markers. ValueError where it has none."""
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold the lines {begin!r} and {end!r}, once each")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
