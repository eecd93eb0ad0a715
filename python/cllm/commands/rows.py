"""The output file of ``cllm generate``: appended row by row, continued when interrupted."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from ..prompts import Prompt
from .common import CommandError

_FRESH = "use --overwrite to start again, or another --output"


class RowFile:
    """JSON lines, one a finished prompt, in the prompts' order.

    A row is on disk (flushed and synced) before the next begins. Opening an existing file keeps its
    rows if they belong to the same prompts and settings, and cuts off a last line that was being
    written when the process died.

    Args:
        path: the file; made if it is missing, its folder too.
        prompts: all prompts of the run.
        settings: what the rows depend on besides the prompt; stored in every row.
        overwrite: drop what the file holds.
        records: a second file with one trajectory a row, kept in step; None for none.

    Raises:
        CommandError: if the file holds something else, or another process is writing it.
    """

    def __init__(
        self,
        path: Path,
        prompts: list[Prompt],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
        records: Path | None = None,
    ) -> None:
        self._path = path
        self._records_path = records
        self._prompts = prompts
        self._settings = settings
        self._stream = _open(path)
        self._records: BinaryIO | None = None
        try:
            self._records = _open(records) if records is not None else None
            if overwrite:
                for stream in filter(None, (self._stream, self._records)):
                    stream.truncate(0)
            self.finished = self._continue()
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any], record: dict[str, Any] | None = None) -> None:
        """Write the next row, and its trajectory record where there is such a file."""
        if self._records is not None and record is not None:
            # before the row: a record without its row is dropped when the run continues
            _write(self._records, record)
        _write(self._stream, {**row, "settings": self._settings})
        self.finished += 1

    def count(self) -> int:
        """Whole rows on disk: `finished`, or one more if an interrupt fell in between."""
        return len(_whole_lines(self._stream)[0])

    def close(self) -> None:
        """Close the files and let other processes have them."""
        for stream in filter(None, (self._stream, self._records)):
            stream.close()

    def _continue(self) -> int:
        """Check the rows that are there, cut off an unfinished one; returns how many stay."""
        lines, cut = _whole_lines(self._stream)
        for number, line in enumerate(lines, start=1):
            self._check(number, line)
        rest = _rest(self._stream, cut)
        if rest and not rest.startswith(b'{"index": '[: len(rest)]):
            raise CommandError(f"{self._path} is no output of cllm generate; {_FRESH}")
        kept = _whole_lines(self._records)[0] if self._records is not None else []
        if self._records is not None and len(kept) < len(lines):
            raise CommandError(
                f"{self._records_path} has {len(kept)} records for the {len(lines)} rows of "
                f"{self._path}; {_FRESH}"
            )
        # only now, when everything was checked, is anything changed
        self._stream.truncate(cut)
        if self._records is not None:
            self._records.truncate(sum(map(len, kept[: len(lines)])))
        return len(lines)

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line)
            index, prompt, settings = row["index"], row["prompt"], row["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{where}: not a row of cllm generate; {_FRESH}") from error
        if index != number - 1 or number > len(self._prompts):
            raise CommandError(f"{where}: a row of another set of prompts; {_FRESH}")
        if prompt != self._prompts[index].text:
            raise CommandError(f"{where}: the row was made for another prompt; {_FRESH}")
        if settings != self._settings:
            names = sorted(set(settings) | set(self._settings))
            changed = [
                f"{name} {settings.get(name)!r} -> {self._settings.get(name)!r}"
                for name in names
                if settings.get(name) != self._settings.get(name)
            ]
            raise CommandError(
                f"{where}: the row was made with other settings ({', '.join(changed)}); {_FRESH}"
            )


def _open(path: Path) -> BinaryIO:
    """Open for reading and appending, locked against other runs until closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "a+b")  # noqa: SIM115 (the caller keeps it)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise CommandError(f"another process is writing {path}; wait for it to end") from error
    return stream


def _write(stream: BinaryIO, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
    stream.flush()
    os.fsync(stream.fileno())


def _whole_lines(stream: BinaryIO) -> tuple[list[bytes], int]:
    """The lines that end in a newline, and the offset behind them."""
    stream.seek(0)
    lines = [line for line in stream if line.endswith(b"\n")]
    return lines, sum(map(len, lines))


def _rest(stream: BinaryIO, offset: int) -> bytes:
    stream.seek(offset)
    return stream.read()
