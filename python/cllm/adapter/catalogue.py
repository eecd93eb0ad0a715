"""The adapters that come with the package, found by the model they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..traits import unwrapped
from .errors import AdapterError
from .fingerprint import base_fingerprint
from .gated import GatedAdapter
from .peft_format import METADATA, read_metadata

# one folder an adapter, called by its name; package data (pyproject.toml, MANIFEST.in)
SHIPPED = Path(__file__).with_name("shipped")


@dataclass(frozen=True)
class ShippedAdapter:
    """An adapter of the package; its weights are not read before `load`.

    Attributes:
        folder: in PEFT's format, with ``cllm_adapter.json`` and a model card, ``README.md``.
        metadata: what ``cllm_adapter.json`` holds.
    """

    folder: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it was trained for, as its metadata say; may be empty."""
        return tuple(str(task) for task in self.metadata.get("tasks") or ())

    def load(self) -> GatedAdapter:
        """Read the weights.

        Raises:
            AdapterError: a file is missing or damaged; the message says what to do.
        """
        try:
            return GatedAdapter.load(self.folder)
        except AdapterError as error:
            raise _damaged(self.folder, error) from error


def shipped_adapters() -> list[ShippedAdapter]:
    """Every adapter in the package, by name; reads their metadata and nothing else.

    Raises:
        AdapterError: the metadata of one cannot be read, or do not name its base.
    """
    if not SHIPPED.is_dir():
        return []
    found = []
    for folder in sorted(path for path in SHIPPED.iterdir() if path.is_dir()):
        try:
            metadata = read_metadata(folder)
            if not isinstance(metadata.get("base_fingerprint"), str):
                raise AdapterError(f"{folder / METADATA} has no base_fingerprint")
            if not isinstance(metadata.get("tasks", []), list):
                raise AdapterError(f"{folder / METADATA}: tasks must be a list of names")
        except AdapterError as error:
            raise _damaged(folder, error) from error
        found.append(ShippedAdapter(folder, metadata))
    return found


def shipped_adapter(
    model: Any, *, task: str | None = None, base_model: str | None = None
) -> ShippedAdapter | None:
    """The package's adapter for `model`, found by the fingerprint of the model's weights.

    Of several, the one whose tasks name `task`; of those that are left, the one with the most
    tasks, then the first by name.

    Args:
        task: what will be decoded, as adapters' metadata call it.
        base_model: hub id that the model is known by. It decides for a model in fp16, whose values
            have been rounded once more than its fingerprint knows (see `base_fingerprint`).

    Returns:
        None if the package has none for these weights.

    Raises:
        AdapterError: as `shipped_adapters`.
    """
    candidates = shipped_adapters()
    if not candidates:
        return None
    base = unwrapped(model)
    if base.dtype == torch.float16:
        field, wanted = "base_model", base_model
    else:
        field, wanted = "base_fingerprint", base_fingerprint(base)
    fitting = [one for one in candidates if wanted and one.metadata.get(field) == wanted]
    return min(
        fitting, key=lambda one: (task not in one.tasks, -len(one.tasks), one.name), default=None
    )


def _damaged(folder: Path, error: AdapterError) -> AdapterError:
    return AdapterError(
        f"the adapter {folder.name} that ships with cllm-kernels is damaged ({error}); "
        "reinstall the package, or decode without an adapter"
    )
