"""The adapter that a command decodes with: which one, how it is announced, with which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CommandError, load_adapter

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import GatedAdapter
    from ..models import LoadedModel

DEFAULT_BLOCK_SIZE = 8


@dataclass(frozen=True)
class ChosenAdapter:
    """An adapter that fits the model.

    Attributes:
        name: of the shipped adapter, or the folder or hub id that was given.
        shipped: whether it came with the package.
        source: folder or hub id to load it from.
    """

    name: str
    adapter: GatedAdapter
    source: str
    shipped: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.size})"

    @property
    def size(self) -> str:
        """Rank and MiB."""
        ranks = self.adapter.ranks
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"rank {rank}, {self.adapter.nbytes / 2**20:.1f} MiB"

    @property
    def line(self) -> str:
        """For the screen: who guesses, and whose text it is."""
        return f"guesses: adapter {self}; text: the base model's"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "shipped": self.shipped,
            "ranks": list(self.adapter.ranks),
            "parameters": self.adapter.parameters,
            "mebibytes": self.adapter.nbytes / 2**20,
            "base_model": self.adapter.metadata.get("base_model"),
            "tasks": list(self.adapter.metadata.get("tasks") or []),
            "role": "makes the guesses; the text is the base model's",
        }


def given_adapter(source: str, loaded: LoadedModel, errors: Console) -> ChosenAdapter:
    """The adapter of ``--adapter``, checked against the model.

    Raises:
        AdapterError: it cannot be read, or belongs to another model.
    """
    adapter = load_adapter(source, loaded, errors)
    name = Path(source).name if Path(source).is_dir() else source
    return ChosenAdapter(name, adapter, source)


def shipped_for(loaded: LoadedModel) -> ChosenAdapter | None:
    """The package's adapter for the model; None if it has none.

    Raises:
        AdapterError: it is damaged; the message says what to do.
    """
    from .. import default_model
    from ..adapter import shipped_adapter

    known_as = default_model.HUB_ID if loaded.name == default_model.NAME else loaded.name
    found = shipped_adapter(loaded.model, base_model=known_as)
    if found is None:
        return None
    adapter = found.load()
    adapter.check(loaded.model)
    return ChosenAdapter(found.name, adapter, str(found.folder), shipped=True)


def sizes(
    block_size: int | None, verify_size: int | None, mode: str, adapter: ChosenAdapter | None
) -> tuple[int, int | None]:
    """(n, v): what was given, else what the adapter's metadata say, else the default.

    A recorded v gives way to a smaller n that was given, and to block mode, which checks whole
    blocks.

    Raises:
        CommandError: v was given and there is no adapter. AdapterError: bad metadata.
    """
    from ..adapter.sizes import recorded_sizes

    if adapter is None:
        if verify_size is not None:
            raise CommandError("--verify-size needs an adapter, and none is in use; give --adapter")
        return block_size or DEFAULT_BLOCK_SIZE, None
    recorded_n, recorded_v = recorded_sizes(adapter.adapter.metadata)
    n = block_size or recorded_n or max(DEFAULT_BLOCK_SIZE, verify_size or 0)
    if verify_size is None and recorded_v is not None and mode == "sliding":
        verify_size = min(recorded_v, n)
    return n, verify_size
