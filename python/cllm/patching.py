"""Patch a model instance so that its own ``generate`` decodes by Jacobi iteration.

Of decoding, this is the only place that touches a model: one instance attribute, ``generate``,
which hides the method of the class and is taken away again. Training's is `training_patch`.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from .adapter import GatedAdapter, resolve_adapter
from .adapter.peft_model import adapters_off
from .decoding.checks import check_adapter_settings
from .decoding.config import JacobiConfig
from .decoding.generate import run_generate
from .decoding.support import UnsupportedOptionError, check_model

_HANDLE = "_cllm_handle"


class Handle:
    """A patch on one model instance; `remove` takes it off.

    Attributes:
        model: the patched model.
        config: the settings in force.
        adapter: what makes the guesses, or None.
    """

    def __init__(self, model: Any, config: JacobiConfig, adapter: GatedAdapter | None = None):
        self.model = model
        self.config = config
        self.adapter = adapter
        self._hidden = model.__dict__.get("generate")
        self._warned: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether the model still carries this patch."""
        return self.model.__dict__.get(_HANDLE) is self

    def remove(self) -> None:
        """Restore the model's own ``generate``. Removing twice, or a replaced patch, does
        nothing."""
        if not self.active:
            return
        # past torch.nn.Module.__delattr__, which looks among parameters first
        del self.model.__dict__[_HANDLE]
        del self.model.__dict__["generate"]
        if self._hidden is not None:
            self.model.__dict__["generate"] = self._hidden

    def warn_once(self, error: UnsupportedOptionError) -> None:
        if error.option not in self._warned:
            self._warned.add(error.option)
            warnings.warn(f"{error}. This call goes to transformers' own generate.", stacklevel=4)


def patch(model: Any, config: JacobiConfig | None = None, *, adapter: Any = None) -> Handle:
    """Make ``model.generate`` decode by Jacobi iteration.

    Only this instance changes, and only its ``generate``. Calls that Jacobi decoding cannot carry
    out (sampling, beams, assisted generation, ...) go to transformers' own ``generate`` with one
    warning per option. Patching a patched model replaces the settings.

    Args:
        model: a decoder-only transformers model.
        config: settings; the defaults of `JacobiConfig` if None.
        adapter: makes the guesses and leaves the text alone: a `cllm.GatedAdapter`, its folder or
            hub id, or a PEFT model around the same base. It is loaded and checked here, once, and
            never merged. PEFT adapters of `model` itself are off in all patched calls: the text is
            the base model's.

    Returns:
        A handle; ``handle.remove()`` undoes the patch.

    Raises:
        UnsupportedModelError: if the model cannot be decoded this way.
        AdapterError: if the adapter cannot be used, or not with this model.
        ValueError: if `config` sets ``verify_size`` and there is no adapter.
    """
    check_model(model)
    config = config or JacobiConfig()
    check_adapter_settings(config, adapter)
    resolved = None
    if adapter is not None:
        resolved = resolve_adapter(adapter)
        resolved.check(model)
    _current_removed(model)
    return _install(Handle(model, config, resolved))


def _current_removed(model: Any) -> Handle | None:
    handle = model.__dict__.get(_HANDLE)
    if handle is not None:
        handle.remove()
    return handle


def _install(handle: Handle) -> Handle:
    # a bound method, so that a deep copy of the model is bound to the copy
    handle.model.__dict__["generate"] = types.MethodType(_patched_generate, handle.model)
    handle.model.__dict__[_HANDLE] = handle
    return handle


@contextmanager
def patched(
    model: Any, config: JacobiConfig | None = None, *, adapter: Any = None
) -> Iterator[Any]:
    """`patch` for the length of a ``with`` block; an earlier patch is back in force after it."""
    previous = model.__dict__.get(_HANDLE)
    patch(model, config, adapter=adapter)
    try:
        yield model
    finally:
        _current_removed(model)
        if previous is not None:
            _install(previous)


def original_generate(model: Any) -> Any:
    """The ``generate`` that `model` has without our patch."""
    handle = model.__dict__.get(_HANDLE) if hasattr(model, "__dict__") else None
    if handle is None:
        check_model(model)
        return model.generate
    if handle._hidden is not None:
        return handle._hidden
    return types.MethodType(type(model).generate, model)


def _patched_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle = model.__dict__[_HANDLE]
    huggingface_generate = original_generate(model)
    adapter = kwargs.pop("adapter", None) or handle.adapter
    try:
        return run_generate(model, huggingface_generate, handle.config, adapter, args, kwargs)
    except UnsupportedOptionError as error:
        handle.warn_once(error)
        # with an adapter the text is the base model's, whoever decodes it
        with nullcontext() if adapter is None else adapters_off(model):
            return huggingface_generate(*args, **kwargs)
