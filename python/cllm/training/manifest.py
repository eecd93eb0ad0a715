"""`manifest.json`: what a folder of trajectories was made from, and what must be in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_atomically

FORMAT = 1
FILE_NAME = "manifest.json"


class StoreError(ValueError):
    """A folder of trajectories that cannot be read; the message names the file and the way out."""


@dataclass(frozen=True)
class Shard:
    """A file of trajectories.

    Attributes:
        name: within the folder.
        rows: responses in it.
        size: bytes.
        sha256: of the whole file, in hexadecimal.
    """

    name: str
    rows: int
    size: int
    sha256: str


@dataclass
class Manifest:
    """Where trajectories come from, and every file that belongs to them.

    Attributes:
        model: path or hub id, as the user gave it; `revision` the commit where it is known.
        tokenizer_hash: of `tokenizer_hash`.
        block_size: n.
        fill, seed: of the initial guesses.
        versions: of the packages that had a part in it.
        settings: everything else that was chosen, by name.
        shards: in the order of the rows.
        dropped: reason to the number of rows left out for it.
        statistics: as `collect.statistics.CollectionStatistics.to_json` gives them.
        complete: False while collecting is still under way.
    """

    model: str
    revision: str | None
    tokenizer_hash: str
    block_size: int
    fill: str
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def rows(self) -> int:
        """Responses in all shards."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; `from_json` reads it back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, record: Any) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            StoreError: if it is no manifest, or one of a later format.
        """
        if not isinstance(record, dict) or "format" not in record:
            raise StoreError("it is not a manifest of trajectories")
        if record["format"] != FORMAT:
            raise StoreError(
                f"it has the format {record['format']!r}, this version of cllm reads {FORMAT}; "
                "update cllm, or collect again"
            )
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        try:
            values["shards"] = [Shard(**shard) for shard in values.get("shards", [])]
            return cls(**values)
        except TypeError as error:
            raise StoreError(f"a field is missing or has the wrong form: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``manifest.json``, whole or not at all; on return it has reached the disk.

        Raises:
            OSError: if it cannot be written; the one before is then still there.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        return write_atomically(Path(folder) / FILE_NAME, text.encode("utf-8"), durable=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            StoreError: if it is missing or damaged.
        """
        path = Path(folder) / FILE_NAME
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except FileNotFoundError as error:
            raise StoreError(
                f"{os.fspath(folder)} has no {FILE_NAME}, so it is no folder of trajectories; "
                "`cllm collect` makes one"
            ) from error
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        except json.JSONDecodeError as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error


def versions(packages: Iterable[str] = ("torch", "transformers", "cllm-kernels")) -> dict[str, str]:
    """Package name to its installed version; packages that are not installed are left out."""
    from importlib import metadata

    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of how a HuggingFace tokenizer cuts text and numbers the pieces.

    Vocabulary, merges, added tokens, normaliser and pre-tokenizer count; padding, truncation, chat
    template and the name do not. The same in every process, on every machine.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and callable(getattr(backend, "to_str", None)):
        whole = json.loads(backend.to_str())
        model = whole.get("model") or {}
        content = {
            "model": model.get("type"),
            "vocab": model.get("vocab"),
            "merges": _as_pairs(model.get("merges") or []),
            "normalizer": _or_none(whole.get("normalizer"), "normalizers"),
            "pre_tokenizer": _or_none(whole.get("pre_tokenizer"), "pretokenizers"),
        }
    else:
        content = {"vocab": tokenizer.get_vocab()}
    added = tokenizer.added_tokens_decoder
    content["added"] = sorted(
        [int(index), str(token.content), bool(token.special)] for index, token in added.items()
    )
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _or_none(step: Any, parts: str) -> Any:
    """None for a sequence of nothing: releases of transformers differ in which of the two they
    write."""
    empty = isinstance(step, dict) and step.get("type") == "Sequence" and not step.get(parts)
    return None if empty else step


def _as_pairs(merges: list[Any]) -> list[Any]:
    # releases of tokenizers write a merge as "a b" or as ["a", "b"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
