"""What models keep of their captures from one call to the next, and what is known to fail.

A forward that a call works with is out of everybody else's reach, since nobody else may write to
its cache; its bytes count all the same.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .graphs import GraphedForward

# Each holds a KV cache and the activations of a forward.
MOST_KEPT = 4
# Failures that are remembered of a model, so that nobody runs into them again.
MOST_FAILURES = 64

_lock = threading.Lock()
# Of a model, by `graph_key.forward_key`; the latest last.
_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, GraphedForward]] = (
    weakref.WeakKeyDictionary()
)
_in_use: weakref.WeakKeyDictionary[Any, list[Use]] = weakref.WeakKeyDictionary()
# Keys of calls that are not tried again; whether somebody who asked for graphs was told.
_failed: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Use:
    """A call's, of the forward of `key`; `nbytes`: what its cache takes, or will."""

    key: tuple
    nbytes: int
    device: torch.device


@dataclass
class Shelf:
    """What `automatic` makes room on.

    Attributes:
        kept: the model's forwards that no call works with; what is taken from here is let go.
        busy: keys of those that calls work with.
        others: bytes on the device beside `kept`: other models', and what calls work with.
    """

    kept: OrderedDict[tuple, GraphedForward]
    busy: set[tuple]
    others: int


@contextmanager
def looked_at(model: Any, device: torch.device) -> Iterator[Shelf]:
    """What there is at a moment that lasts until the context is left."""
    with _lock:
        uses = [use for uses in _in_use.values() for use in uses if use.device == device]
        others = [
            forward
            for other, forwards in _kept.items()
            if other is not model
            for forward in forwards.values()
            if forward.plan.device == device
        ]
        taken = sum(use.nbytes for use in uses) + sum(forward.nbytes for forward in others)
        busy = {use.key for use in _in_use.get(model, ())}
        yield Shelf(_kept.setdefault(model, OrderedDict()), busy, taken)


@contextmanager
def in_use(model: Any, use: Use, alone: bool) -> Iterator[bool]:
    """Tells everybody of `use` while the context lasts.

    Args:
        alone: not where another call works with the same key.

    Yields:
        False where that is so.
    """
    with _lock:
        uses = _in_use.setdefault(model, [])
        free = not (alone and any(one.key == use.key for one in uses))
        if free:
            uses.append(use)
    try:
        yield free
    finally:
        if free:
            with _lock:
                uses.remove(use)


def take(model: Any, key: tuple) -> GraphedForward | None:
    """The forward that is kept under `key`, which is not from now on."""
    with _lock:
        return _kept.setdefault(model, OrderedDict()).pop(key, None)


def put_back(model: Any, key: tuple, forward: GraphedForward) -> None:
    """Keep it for further calls; what has been there longest goes where there are too many."""
    with _lock:
        kept = _kept.setdefault(model, OrderedDict())
        kept[key] = forward
        while len(kept) > MOST_KEPT:
            kept.popitem(last=False)


def note_failure(model: Any, call_key: tuple, told: bool) -> None:
    """A capture for such calls failed; `told`: somebody who asked for it heard of that."""
    with _lock:
        failures = _failed.setdefault(model, OrderedDict())
        failures[call_key] = told or failures.get(call_key, False)
        while len(failures) > MOST_FAILURES:
            failures.popitem(last=False)


def failed(model: Any, call_key: tuple, automatic: bool) -> bool:
    """Whether a capture for such calls is not to be tried again: one failed, of which whoever asks
    for graphs was told."""
    with _lock:
        known = _failed.get(model) or OrderedDict()
        told = known.get(call_key)
        return told is not None and (told or automatic)


def forget(model: Any) -> None:
    """Let go of all captures of `model` and of their memory, and of what is known to fail."""
    with _lock:
        _kept.pop(model, None)
        _failed.pop(model, None)


def let_go(model: Any) -> None:
    """Make room: all captures of `model` go, and their memory back to the device."""
    with _lock:
        _kept.pop(model, None)
    gc.collect()
    torch.cuda.empty_cache()


def with_room(model: Any, run: Callable[[], None]) -> None:
    """`run`; where memory is short, once more without the captures that `model` keeps."""
    try:
        return run()
    except torch.OutOfMemoryError:
        if not kept_bytes(model):
            raise
    let_go(model)
    return run()


def kept_bytes(model: Any) -> int:
    """Bytes of the KV caches and states that captures of `model` keep; a capture's activations,
    which torch holds in a pool of its own, come on top."""
    with _lock:
        forwards = list(_kept.get(model, {}).values())
    return sum(forward.nbytes for forward in forwards)
