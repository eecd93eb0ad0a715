"""Trajectories on disk: a folder of Parquet shards and a manifest.

One row a response. Shards are written whole and never changed; the manifest names every shard with
its checksum, so what a crash, a full disk or another program left behind never passes for data.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..files import write_atomically
from .examples import BlockStates, TrainingExample
from .manifest import FILE_NAME, FORMAT, Manifest, Shard, StoreError, tokenizer_hash, versions

__all__ = [
    "Manifest",
    "Shard",
    "StoreError",
    "TrajectoryDataset",
    "load_trajectories",
    "shard_name",
    "tokenizer_hash",
    "versions",
    "write_shard",
]

PATTERN = "part-*.parquet"
# what is decoded to read one row; small, because training reads rows in random order
_ROW_GROUP = 16
_DECODED_GROUPS = 8


def shard_name(number: int, process: int = 0) -> str:
    """``part-00003.parquet``; with more than one writer, ``part-<process>-<number>.parquet``."""
    return f"part-{number:05d}.parquet" if process == 0 else f"part-{process}-{number:05d}.parquet"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError(
            "trajectories are stored through pyarrow; pip install 'cllm-kernels[train]'"
        ) from error
    return pyarrow


def _schema(pa: Any) -> Any:
    tokens = pa.list_(pa.int32())
    columns = {
        "id": pa.string(),
        "prompt": tokens,  # [P]
        "response": tokens,  # [T]
        "block_size": pa.int32(),
        "block_index": tokens,  # [blocks]
        "states": pa.list_(pa.list_(tokens)),  # [blocks][states][m]
        "iterations": tokens,  # [blocks]
        "first_divergence": pa.list_(tokens),  # [blocks][states]
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns.items()],
        metadata={"cllm_trajectories": str(FORMAT)},
    )


def write_shard(path: str | os.PathLike[str], examples: Sequence[TrainingExample]) -> Shard:
    """Write ``examples`` as one Parquet file, whole or not at all; on return it is on the disk.

    Returns:
        The shard's entry for `Manifest.shards`.

    Raises:
        StoreError: if there are no examples, or pyarrow is not installed.
        OSError: if the file cannot be written (a full disk); nothing of it is then left.
    """
    if not examples:
        raise StoreError(f"{os.fspath(path)}: a shard needs at least one example")
    pa = _pyarrow()
    columns: dict[str, list[Any]] = {
        "id": [example.id for example in examples],
        "prompt": [example.prompt for example in examples],
        "response": [example.response for example in examples],
        "block_size": [example.block_size for example in examples],
        "block_index": [example.block_index for example in examples],
        "states": [[block.states for block in example.blocks] for example in examples],
        "iterations": [[block.iterations for block in example.blocks] for example in examples],
        "first_divergence": [
            [block.first_divergence for block in example.blocks] for example in examples
        ],
    }
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(
        pa.table(columns, schema=_schema(pa)), sink, row_group_size=_ROW_GROUP, compression="zstd"
    )
    content = sink.getvalue().to_pybytes()
    path = write_atomically(path, content, durable=True)
    digest = hashlib.sha256(content).hexdigest()
    return Shard(name=path.name, rows=len(examples), size=len(content), sha256=digest)


def check_shard(folder: str | os.PathLike[str], shard: Shard, *, checksum: bool = True) -> None:
    """Raises StoreError if a shard is missing, is not the file that was written, or holds other
    columns than trajectories."""
    path = Path(folder) / shard.name
    again = "delete it and run `cllm collect` again"
    if not path.is_file():
        raise StoreError(f"{path} is missing, but the manifest names it; {again}")
    size = path.stat().st_size
    if size != shard.size:
        raise StoreError(f"{path} is damaged: {size} bytes instead of {shard.size}; {again}")
    if checksum:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != shard.sha256:
            raise StoreError(f"{path} is damaged: its checksum is not the manifest's; {again}")
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            found, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is no readable Parquet file: {error}; {again}") from error
    wanted = _schema(pa)
    if found.names != wanted.names or found.types != wanted.types:
        raise StoreError(
            f"{path} holds no trajectories: its columns are {', '.join(found.names)} instead of "
            f"{', '.join(wanted.names)}"
        )
    if rows != shard.rows:
        raise StoreError(f"{path} has {rows} rows, the manifest says {shard.rows}; {again}")


class TrajectoryDataset(Dataset[TrainingExample]):
    """The responses of one or more folders, read when asked for.

    Map-style: ``len``, integer indices, any order. Pickles without its open files, so it can be
    handed to the workers of a `torch.utils.data.DataLoader`.

    Attributes:
        folders: where the rows lie, in order.
        manifests: one a folder.
    """

    def __init__(self, folders: Sequence[Path], manifests: Sequence[Manifest]):
        self.folders = list(folders)
        self.manifests = list(manifests)
        self._paths: list[Path] = []
        rows: list[int] = []
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            self._paths += [folder / shard.name for shard in manifest.shards]
            rows += [shard.rows for shard in manifest.shards]
        self._ends = list(accumulate(rows))
        self._forget()

    @property
    def manifest(self) -> Manifest:
        """The first folder's; n and the tokenizer are the same in all of them."""
        return self.manifests[0]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> TrainingExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        group, offset = divmod(row, _ROW_GROUP)
        return _example(self._group(shard, group).slice(offset, 1).to_pylist()[0])

    def _group(self, shard: int, group: int) -> Any:
        key = shard, group
        if key not in self._groups:
            if shard not in self._files:
                self._files[shard] = _pyarrow().parquet.ParquetFile(
                    self._paths[shard], memory_map=True
                )
            try:
                # no threads: little is read, and workers that were forked have none
                self._groups[key] = self._files[shard].read_row_group(group, use_threads=False)
            except (_pyarrow().ArrowException, OSError) as error:
                raise StoreError(f"{self._paths[shard]} is damaged: {error}") from error
            if len(self._groups) > _DECODED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _forget(self) -> None:
        self._files: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OPEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


_OPEN = ("_files", "_groups")


def _example(row: dict[str, Any]) -> TrainingExample:
    return TrainingExample(
        id=row["id"],
        prompt=row["prompt"],
        response=row["response"],
        block_size=row["block_size"],
        blocks=[BlockStates(states) for states in row["states"]],
        block_index=row["block_index"],
    )


def load_trajectories(
    *folders: str | os.PathLike[str], tokenizer: Any = None, checksum: bool = True
) -> TrajectoryDataset:
    """Open one or more folders of trajectories, joined in the order given.

    Args:
        tokenizer: of the model to train; checked to be the one that the token ids belong to.
        checksum: read every file once to see that it is what was written.

    Raises:
        StoreError: a missing or damaged manifest or shard, a file that the manifest does not
            know, no rows, another tokenizer, or folders that do not fit each other.
    """
    if not folders:
        raise StoreError("no folder of trajectories was given")
    paths = [Path(folder) for folder in folders]
    manifests = [Manifest.load(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        _check_fits(paths[0], manifests[0], path, manifest)
        known = {shard.name for shard in manifest.shards}
        unknown = sorted(found.name for found in path.glob(PATTERN) if found.name not in known)
        if unknown:
            raise StoreError(
                f"{path / unknown[0]} is not in {FILE_NAME}: it is another run's, or collecting "
                "was cut short; run `cllm collect` again to take it in, or delete it"
            )
        for shard in manifest.shards:
            check_shard(path, shard, checksum=checksum)
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifests[0].tokenizer_hash:
        raise StoreError(
            f"the tokenizer is not the one that {paths[0]} was collected with (model "
            f"{manifests[0].model}): its token ids would mean other text; train the same model, or "
            "collect with this one"
        )
    if not any(manifest.rows for manifest in manifests):
        raise StoreError(f"{_names(paths)} holds no trajectories: every prompt was dropped")
    return TrajectoryDataset(paths, manifests)


def _check_fits(first: Path, wanted: Manifest, path: Path, manifest: Manifest) -> None:
    for name, what in (("block_size", "block sizes"), ("tokenizer_hash", "tokenizers")):
        if getattr(manifest, name) != getattr(wanted, name):
            values = ""
            if name == "block_size":
                values = f" ({wanted.block_size} and {manifest.block_size})"
            raise StoreError(
                f"{first} and {path} were collected with different {what}{values}, so they cannot "
                "be joined; train on one of them"
            )


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(str(path) for path in paths)
