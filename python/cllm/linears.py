"""Linear layers of few rows on a CPU, and the head on a GPU, through `cllm_kernels.block_linear`.

GPT-2's `Conv1D` is one whose weight lies across, [in, out], and is read as it lies.

torch's own product of few rows reads the weights at less than half of the speed of memory, and the
bits of a row change with the number of rows. Here neither is so: what one-token decoding and a
window of n tokens give in a linear layer is the same, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import cllm_kernels

# More rows are a matter of arithmetic, not of memory, and torch's.
MOST_ROWS = 64
_MOST_ROWS_WIDENED = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


class Term(Protocol):
    """A low-rank term that some rows of a layer get, in some forwards of some threads."""

    @property
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """a [R, in] and b [out, R], as `cllm_kernels.block_linear` takes them."""

    def lay_above(self, others: Sequence[Term]) -> None:
        """Put a of `others`, whose modules read the same input, below this one's in memory, so that
        one product takes them all."""

    def rows(self) -> tuple[int, int, int] | None:
        """(first, batch, width): forwards over [batch, width] tokens get it from column `first`
        on; None: this thread's forward does not get it."""

    def add(self, x: Tensor, output: Tensor, rows: tuple[int, int, int]) -> None:
        """Add it in place to the output of a forward that `cllm_kernels.block_linear` is not for.

        Args:
            x: [.., in] and output: [.., out]; .. is batch and width, or their product.
        """


_lock = threading.Lock()
# modules whose forward is replaced right now -> for how many reasons
_users: dict[torch.nn.Module, int] = {}
# those among them that `block_linears` is for
_blocks: dict[torch.nn.Module, int] = {}
_terms: dict[torch.nn.Module, tuple[Term, ...]] = {}
_changes = 0  # how often `_terms` has changed


@contextmanager
def block_linears(
    model: torch.nn.Module, others: Sequence[torch.nn.Module | None] = ()
) -> Iterator[None]:
    """Let the linear layers of `model` that are on a CPU take up to `MOST_ROWS` rows through
    `cllm_kernels.block_linear`, for a while.

    Only layers that are `fusable`, and `Conv1D`. The last concurrent call to leave puts the layers'
    own forward back.

    Args:
        others: those for which that holds on a GPU, too.
    """
    with _lock:
        chosen: list[Any] = [
            module
            for module in model.modules()
            if module in _users or fusable(module) or _plain(module, Conv1D)
        ]
        chosen = [m for m in chosen if m.weight.is_cpu or any(m is other for other in others)]
        for module in chosen:
            _enter(module)
            _blocks[module] = _blocks.get(module, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for module in chosen:
                _blocks[module] -= 1
                if not _blocks[module]:
                    del _blocks[module]
                _leave(module)


def fusable(module: torch.nn.Module) -> bool:
    """A plain `torch.nn.Linear` on a device and in a dtype of the kernels: no subclass (a quantised
    layer, say), nothing parametrised, and no layer whose forward is somebody else's already."""
    return _plain(module, torch.nn.Linear)


def _plain(module: torch.nn.Module, kind: type) -> bool:
    if type(module) is not kind:
        return False
    if "forward" in module.__dict__ and module not in _users:
        return False
    weight = module.weight
    known = weight.dtype in DTYPES and weight.device.type in _DEVICES
    return type(weight) is torch.nn.Parameter and known


def most_rows(dtype: torch.dtype, across: bool) -> int:
    """That `block_linear` is faster for; of a weight that lies across, [in, out], in 16 bits fewer,
    as its entries are widened one by one."""
    return _MOST_ROWS_WIDENED if across and dtype is not torch.float32 else MOST_ROWS


def replaced(module: torch.nn.Module) -> bool:
    """Whether the forward of `module` is one from here right now."""
    return module in _users


def add_term(module: torch.nn.Module, term: Term) -> Callable[[], None]:
    """Give `module`, which is `fusable`, a term; returns what takes it back.

    In `block_linears` it is a part of the product of few rows, in native decoder layers of those.
    Otherwise the layer's output is what it was, with the term added to it.
    """
    global _changes
    with _lock:
        _enter(module)
        _terms[module] = (*_terms.get(module, ()), term)
        _changes += 1

    def remove() -> None:
        global _changes
        with _lock:
            left = tuple(other for other in _terms[module] if other is not term)
            if left:
                _terms[module] = left
            else:
                del _terms[module]
            _changes += 1
            _leave(module)

    return remove


def changes() -> int:
    """Goes up whenever a module is given a term or loses one."""
    return _changes


def gates(
    modules: Iterable[torch.nn.Module],
) -> tuple[Callable[[], tuple[int, int, int] | None], ...]:
    """The `Term.rows` of all terms of `modules`, each of them once: which terms a forward gets is
    known from these, until `changes`."""
    return tuple(dict.fromkeys(t.rows for module in modules for t in _terms.get(module, ())))


def active_terms(
    modules: Sequence[torch.nn.Module],
) -> tuple[tuple[Term | None, ...], tuple[int, int, int] | None]:
    """The term that each of `modules` gets in this thread's forward, and the rows that get it, see
    `Term.rows`.

    Raises:
        RuntimeError: several terms for one module, or terms for different rows.
    """
    found: list[Term | None] = []
    gates: set[tuple[int, int, int]] = set()
    for module in modules:
        active = [(term, rows) for term in _terms.get(module, ()) if (rows := term.rows())]
        gates.update(rows for _, rows in active)
        if len(active) > 1 or len(gates) > 1:
            raise RuntimeError("several adapters are on in one forward of a decoder layer")
        found.append(active[0][0] if active else None)
    return tuple(found), next(iter(gates), None)


# Other threads look at `_users` without the lock, to know a forward as one from here: a module is
# there before its forward is, and as long as it is.
def _enter(module: Any) -> None:
    before = _users.get(module, 0)
    _users[module] = before + 1
    if not before:
        module.forward = partial(_forward, module, module.forward)


def _leave(module: Any) -> None:
    if _users[module] == 1:
        del module.forward
        del _users[module]
    else:
        _users[module] -= 1


def _few(module: Any, x: Tensor) -> bool:
    """Whether `block_linear` may stand for torch's product."""
    if x.dim() == 0 or x.dtype is not module.weight.dtype:
        return False
    if x.numel() > most_rows(x.dtype, type(module) is Conv1D) * x.shape[-1]:
        return False
    # which would multiply in another dtype
    return not torch.is_autocast_enabled(x.device.type)


def _forward(module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]."""
    few = module in _blocks and _few(module, x)
    for term in _terms.get(module, ()):
        rows = term.rows()
        if rows is None:
            continue
        first, batch, width = rows
        if few and x.dim() == 3 and x.shape[:2] == (batch, width):
            return cllm_kernels.block_linear(
                x, module.weight, module.bias, low_rank=term.low_rank, gated_from=first
            )
        # tokens of all rows in one dimension, say: the other rows' bits stay those of no term
        output = _without_term(module, own, x, few)
        term.add(x, output, rows)
        return output
    return _without_term(module, own, x, few)


def _without_term(module: Any, own: Callable[[Tensor], Tensor], x: Tensor, few: bool) -> Tensor:
    if not few:
        return own(x)
    across = type(module) is Conv1D
    weight = module.weight.t() if across else module.weight
    return cllm_kernels.block_linear(x, weight, module.bias)
