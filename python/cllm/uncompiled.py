"""Compiled models, decoded as if they were not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_calls = 0
_stance: Any = None


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run what `torch.compile` has made of `model`, or of parts of it, eagerly for a while.

    The forwards of a call differ in shape and in the numbers that their cache is cut by, so that
    they would be compiled again and again; and neither native layers nor linear layers of few rows
    can be traced. The stance is that of the whole process: other threads' compiled models run
    eagerly meanwhile, too. The last concurrent call to leave puts it back.
    """
    if not any_compiled(model):
        yield
        return
    global _calls, _stance
    with _lock:
        if not _calls:
            _stance = torch.compiler.set_stance("force_eager")
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _stance.__exit__(None, None, None)


def any_compiled(model: Any) -> bool:
    """Whether `torch.compile` was at `model`, or at a part of it."""
    return any(_compiled(module) for module in model.modules())


def _compiled(module: Any) -> bool:
    """Whether this very module is compiled: in place, wrapped, or by its forward."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = module.__dict__.get("forward")
    return "_orig_mod" in module._modules or hasattr(forward, "_torchdynamo_orig_callable")
