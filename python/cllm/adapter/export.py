"""A trained adapter's folder made ready to be given away: checked, small, free of local paths."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from .card import CARD, render_card
from .errors import AdapterError
from .fingerprint import base_fingerprint
from .gated import GatedAdapter
from .peft_format import WEIGHTS, find_folder
from .sizes import recorded_sizes

SHIPPING_LIMIT = 16 * 2**20
RECIPE = "cllm_recipe.json"
# what is kept of the trained folder's metadata; names of a machine's files are not
_KEPT = (
    *("block_size", "verify_size", "tasks", "step", "noisy_tokens", "noisy_tokens_forwarded"),
    "averaged",
)


def export_adapter(
    source: str | Path,
    destination: str | Path,
    model: Any,
    *,
    base_model: str,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int | None = None,
    verify_size: int | None = None,
    tasks: Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    limit: int = SHIPPING_LIMIT,
    overwrite: bool = False,
) -> Path:
    """Write a trained adapter as PEFT's folder with a model card, for the package or the hub.

    The metadata say which base it is for, by hub id and fingerprint, and how to decode with it.
    Paths of the machine that trained it are left out.

    Args:
        source: folder or hub id of the adapter.
        destination: folder to make; its name is the adapter's.
        model: the base, to check the adapter against.
        base_model: hub id (owner/name) that the base is known by.
        dtype: of the written weights.
        block_size, verify_size: best sizes of decoding; None: as the source's metadata say.
        tasks: what it was trained for; None: as the source's metadata say.
        results, facts: for the model card, see `cllm.adapter.card.render_card`.
        limit: most bytes of the weights' file.
        overwrite: replace `destination`, if an adapter is there.

    Returns:
        The destination, which appears whole or not at all.

    Raises:
        AdapterError: the adapter cannot be read, is not trained with the gate, is for other
            weights, or too large; bad sizes; results or facts of another form; something stands
            at `destination`.
        ValueError: `base_model` is no hub id.
        OSError: a folder that cannot be written.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ValueError(f"base_model must be a hub id (owner/name), not {base_model!r}")
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    check_destination(destination, overwrite)
    folder = find_folder(source)
    adapter = GatedAdapter.load(folder)
    if adapter.metadata.get("gated") is not True:
        raise AdapterError(
            f"{source} does not say that it was trained with the gate; only gated adapters are "
            "exported"
        )
    adapter.check(model)
    for name, pair in adapter.weights.items():
        for tensor in (pair.a, pair.b):
            if not bool(torch.isfinite(tensor.to(dtype)).all()):
                raise AdapterError(f"weights of {name} are too large for {dtype}; choose another")
    metadata = {name: adapter.metadata.get(name) for name in _KEPT}
    given = {"block_size": block_size, "verify_size": verify_size, "tasks": tasks and list(tasks)}
    metadata |= {name: value for name, value in given.items() if value is not None}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    recorded_sizes(metadata)
    metadata = {
        "gated": True,
        "base_model": base_model,
        "base_fingerprint": base_fingerprint(model),
        **metadata,
    }
    clean = GatedAdapter(adapter.weights, metadata)
    card = render_card(
        clean,
        destination.name,
        dtype=dtype,
        recipe=_read_recipe(folder / RECIPE),
        results=results,
        facts=facts,
    )
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        clean.save(part, dtype=dtype)
        size = (part / WEIGHTS).stat().st_size
        if size > limit:
            raise AdapterError(
                f"the adapter takes {size / 2**20:.3g} MiB in {str(dtype).removeprefix('torch.')}, "
                f"more than {limit / 2**20:.3g} MiB; train one of a smaller rank"
            )
        write_atomically(part / CARD, card.encode("utf-8"))
        part.chmod(0o755)
        move_into_place(part, destination)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return destination


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises AdapterError if something stands there that may not be replaced."""
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise AdapterError(f"{destination} is there already; name another folder, or overwrite it")
    # nothing but an adapter is ever removed
    find_folder(destination)


def move_into_place(part: Path, destination: Path) -> None:
    """Put `part` at `destination`; an old folder goes when the new one is in place."""
    if not destination.exists():
        part.rename(destination)
        return
    old = part.with_name(part.name + "-replaced")
    destination.rename(old)
    try:
        part.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    shutil.rmtree(old)


def _read_recipe(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        raise AdapterError(f"{path} is no recipe that cllm train has written")
    return value
