"""The folder that `cllm collect` fills: what it is for, what is finished, and who may write it.

    part-00000.parquet, ...   the shards
    manifest.json             appears when the last shard is there
    progress/run.json         what the run was asked for; one that asks for other things is refused
    progress/00000.json, ...  a shard's counts, written behind it: without it, a shard is made again
    progress/process-0.lock   held by the process of that rank while it runs

Everything appears whole or not at all, so a run may be killed at any moment and continued.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..manifest import FILE_NAME, Shard
from ..store import PATTERN, StoreError, check_shard, shard_name

_FORMAT = 1
_FRESH = "use --overwrite to start again, or another --output"


class FolderError(ValueError):
    """A folder that this run may not write; the message says what to do."""


@dataclass(frozen=True)
class ShardRecord:
    """What became of the prompts of one shard.

    Attributes:
        number: of the shard, from 0.
        prompts: how many it was made from.
        shard: the file; None where every prompt was dropped.
        dropped: reason to count.
        statistics: of the kept rows, as `CollectionStatistics.to_json` gives them.
        counts: of tokens and rows, to be added up over shards.
        longest: tokens of the longest response that was kept.
        seconds: time spent on it, by stage.
    """

    number: int
    prompts: int
    shard: Shard | None
    dropped: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ShardRecord:
        """The inverse of ``dataclasses.asdict``."""
        shard = record.get("shard")
        return cls(**{**record, "shard": Shard(**shard) if shard else None})


class Folder:
    """The folder of a run, open for one of its processes.

    Args:
        path: made where it is missing.
        settings: what the rows depend on.
        prompts: how many the run has.
        shard_size: prompts of a shard; the last one may have fewer.
        rank, world_size: this process, and how many work on the folder together.
        overwrite: drop what the folder holds; for a single process.

    Raises:
        FolderError: if the folder holds something else, or another run is writing it.
        StoreError: if one of its finished shards is damaged.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        prompts: int,
        shard_size: int,
        rank: int = 0,
        world_size: int = 1,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.shards = -(-prompts // shard_size)
        self._progress = path / "progress"
        if path.exists() and not path.is_dir():
            raise FolderError(f"{path} is a file; name a folder")
        self._progress.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._lock = _process_lock(self._progress, rank, world_size)
            try:
                if overwrite:
                    self._clear(world_size)
                self._check(settings)
            except BaseException:
                self.close()
                raise

    def finished(self, number: int) -> bool:
        """Whether shard `number` is there."""
        return self._record_path(number).exists()

    def finished_shards(self) -> int:
        """How many shards are there, whoever made them."""
        return sum(map(self.finished, range(self.shards)))

    def shard_path(self, number: int) -> Path:
        """Where shard `number` belongs."""
        return self.path / shard_name(number)

    def finish(self, record: ShardRecord) -> None:
        """Write down that a shard is there; its file must be."""
        content = json.dumps(asdict(record), indent=1, allow_nan=False) + "\n"
        write_atomically(self._record_path(record.number), content.encode(), durable=True)

    def records(self) -> list[ShardRecord]:
        """Of all shards that are there, in order."""
        return [self._read(number) for number in range(self.shards) if self.finished(number)]

    @contextmanager
    def completed(self) -> Iterator[bool]:
        """Holds the other processes off; True if every shard is there."""
        with self._alone():
            complete = self.finished_shards() == self.shards
            if complete:
                # left by processes that died while writing; none is writing now
                for folder in (self.path, self._progress):
                    for rest in folder.glob("*.part"):
                        rest.unlink(missing_ok=True)
            yield complete

    def close(self) -> None:
        """Let other runs have the folder."""
        self._lock.close()

    def _record_path(self, number: int) -> Path:
        return self._progress / f"{number:05d}.json"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for the moment in which no other process looks over the folder."""
        with open(self._progress / "folder.lock", "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _clear(self, world_size: int) -> None:
        if world_size > 1 and (self._progress / "run.json").exists():
            raise FolderError(
                f"several processes cannot overwrite {self.path} together; delete it first, or run "
                "once with one process"
            )
        for file in (*self.path.glob(PATTERN), *self.path.glob("*.part")):
            file.unlink()
        (self.path / FILE_NAME).unlink(missing_ok=True)
        for file in (*self._progress.glob("*.json"), *self._progress.glob("*.part")):
            file.unlink()

    def _check(self, settings: dict[str, Any]) -> None:
        """Take the folder over for `settings`, or refuse it."""
        run = self._progress / "run.json"
        known = {shard_name(number) for number in range(self.shards)}
        parts = sorted(path.name for path in self.path.glob(PATTERN))
        if not run.exists():
            if parts or (self.path / FILE_NAME).exists():
                name = parts[0] if parts else FILE_NAME
                raise FolderError(
                    f"{self.path} holds {name}, but nothing tells of a run of cllm collect that "
                    f"could be continued; {_FRESH}"
                )
            content = json.dumps({"format": _FORMAT, "settings": settings}, indent=1) + "\n"
            write_atomically(run, content.encode(), durable=True)
            return
        try:
            before = json.loads(run.read_bytes())["settings"]
            items = dict(before)
        except (ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{run} is damaged; {_FRESH}") from error
        changed = differences(items, json.loads(json.dumps(settings)))
        if changed:
            raise FolderError(
                f"{self.path} was made with other settings ({', '.join(changed)}); {_FRESH}"
            )
        foreign = [name for name in parts if name not in known]
        if foreign:
            raise FolderError(
                f"{self.path / foreign[0]} belongs to no shard of this run; move it away"
            )
        for number in range(self.shards):
            if self.finished(number):
                self._check_shard(number)

    def _check_shard(self, number: int) -> None:
        record = self._read(number)
        if record.shard is None:
            return
        if not self.shard_path(number).exists():
            # deleted by hand, as the messages about damaged shards advise: to be made again
            self._record_path(number).unlink()
            return
        check_shard(self.path, record.shard)

    def _read(self, number: int) -> ShardRecord:
        path = self._record_path(number)
        try:
            return ShardRecord.from_json(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged ({error}); delete it and run `cllm collect` again"
            ) from error


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What changed between two sets of settings, as ``name old -> new``."""
    changed = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changed.append(f"{prefix}{name} {old!r} -> {new!r}")
    return changed


def _process_lock(folder: Path, rank: int, world_size: int) -> Any:
    """The lock of this process's rank, after a look at those of other runs."""
    for path in sorted(folder.glob("process-*.lock")):
        with open(path, "rb") as other:
            if path.name == f"process-{rank}.lock" or not _locked(other):
                continue
            size = other.read().decode("ascii", "replace").strip()
            if size != str(world_size):
                raise FolderError(
                    f"another run of {size} process(es) is writing {folder.parent}; wait for it "
                    "to end"
                )
    stream = open(folder / f"process-{rank}.lock", "a+b")  # noqa: SIM115 (kept by the folder)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise FolderError(
            f"another process (rank {rank}) is writing {folder.parent}; wait for it to end"
        ) from error
    stream.truncate(0)
    stream.write(str(world_size).encode())
    stream.flush()
    os.fsync(stream.fileno())
    return stream


def _locked(stream: Any) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(stream, fcntl.LOCK_UN)
    return False
