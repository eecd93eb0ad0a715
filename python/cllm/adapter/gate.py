"""The gate: from which column of a forward on the low-rank weights are added."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..traits import UnsupportedModelError


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


def low_rank_hook(
    gate: Gate, name: str, a: torch.Tensor, b: torch.Tensor
) -> Callable[[torch.nn.Module, Any, Any], None]:
    """A forward hook that adds ``(x @ a^T) @ b^T`` in place to the gated rows of a module's output.

    The other rows are not touched: no product with a mask, so their bits are the base model's.

    Args:
        name: of the module, for messages.
        a: [r, in] and b: [out, r] in the dtype and on the device of the module; the scale is in b.
    """

    def add(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        rows = gate.rows()
        if rows is None:
            return
        first, batch, width = rows
        x: Any = inputs[0] if inputs else None
        for tensor in (x, output):
            if not isinstance(tensor, torch.Tensor) or tensor.shape[:-1] not in (
                (batch, width),
                (batch * width,),
            ):
                raise UnsupportedModelError(
                    f"{name} does not see the window's tokens in order, so the adapter cannot "
                    "be told from the base there; train one without this target"
                )
        gated = x.reshape(batch, width, -1)[:, first:]
        delta = torch.nn.functional.linear(torch.nn.functional.linear(gated, a), b)
        output.view(batch, width, -1)[:, first:].add_(delta)

    return add
