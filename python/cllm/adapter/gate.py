"""The gate: from which column of a forward on the low-rank weights are added."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate(threading.local):
    """Closed, unless the thread that runs the forward opens it."""

    def __init__(self) -> None:
        self._rows: tuple[int, int, int] | None = None

    @contextmanager
    def open(self, first: int, batch: int, width: int) -> Iterator[None]:
        """Meanwhile, forwards over [batch, width] tokens get the adapter from column `first` on."""
        self._rows = first, batch, width
        try:
            yield
        finally:
            self._rows = None

    def rows(self) -> tuple[int, int, int] | None:
        """(first, batch, width) while open, None while closed."""
        return self._rows
