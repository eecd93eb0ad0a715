"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(
    path: str | os.PathLike[str], content: bytes, *, durable: bool = False
) -> Path:
    """Write ``content`` beside ``path`` and move it into place; makes the folder where missing.

    A process killed meanwhile leaves at most a file of another name, ending in ``.part``.

    Args:
        durable: return only when file and name have reached the disk (fsync), so that they
            outlast a power failure too.

    Returns:
        The path written.

    Raises:
        OSError: if the folder or the file cannot be written, or the disk is full; ``path`` is
            then as it was, and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        # mkstemp makes the file private; a report is meant to be shared like any other file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as failure:
        os.unlink(temporary)
        if isinstance(failure, OSError) and failure.errno is not None and not failure.filename:
            # a failed write names no file by itself
            raise OSError(failure.errno, failure.strerror, str(path)) from failure
        raise
    if durable:
        _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and need not be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
