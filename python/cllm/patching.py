"""Patch a model instance so that its own ``generate`` decodes by Jacobi iteration.

Of decoding, this is the only place that touches a model: one instance attribute, ``generate``,
which hides the method of the class and is taken away again. Training's is `training_patch`.
"""

from __future__ import annotations

import re
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from .adapter import GatedAdapter, resolve_adapter
from .adapter.peft_model import adapters_off
from .decoding.checks import check_adapter_settings
from .decoding.config import FIELDS, JacobiConfig
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
        self._warned: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether this patch is the one in force."""
        return _current(self.model) is self

    def remove(self) -> None:
        """Take the patch off; one that it hid, of a ``with`` block around it, is in force again,
        else the model's own ``generate``. Removing twice, or a replaced patch, does nothing."""
        with _lock:
            patches = _patches(self.model)
            if patches is not None:
                patches.drop([place for place in patches.places if place.handle is self])

    def warn_once(self, error: UnsupportedOptionError) -> None:
        # "a prompt of 300 tokens" is one with that of 301
        option = re.sub(r"\d+", "", error.option)
        if option not in self._warned:
            self._warned.add(option)
            warnings.warn(f"{error}. This call goes to transformers' own generate.", stacklevel=4)


def patch(model: Any, config: JacobiConfig | None = None, *, adapter: Any = None) -> Handle:
    """Make ``model.generate`` decode by Jacobi iteration.

    Only this instance changes, and only its ``generate``. Calls that Jacobi decoding cannot carry
    out (beams, assisted generation, ...) go to transformers' own ``generate`` with one
    warning per option. Patching a patched model replaces the settings. Deep copies and pickles of a
    patched model are patched for themselves; ``copy.copy`` shares the first's until it is patched.

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
    handle = _handle(model, config, adapter)
    with _lock:
        patches = _patches(model) or _Patches(model)
        if patches.places:
            patches.places[-1].handle = handle
        else:
            patches.add(_Place(handle))
    return handle


def _handle(model: Any, config: JacobiConfig | None, adapter: Any) -> Handle:
    check_model(model)
    config = config or JacobiConfig()
    check_adapter_settings(config, adapter)
    resolved = None
    if adapter is not None:
        resolved = resolve_adapter(adapter)
        resolved.check(model)
    return Handle(model, config, resolved)


_lock = threading.RLock()


class _Place:
    """Of a ``with`` block, or of `patch` outside of any: the patch that is in force there."""

    def __init__(self, handle: Handle):
        self.handle = handle


class _Generate:
    """What hides a model's ``generate``: a bound method that deep copies and pickles of the model
    have one of for themselves."""

    def __init__(self, patches: _Patches):
        self.patches = patches

    @property
    def __self__(self) -> Any:
        return self.patches.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _patched_generate(self.patches, *args, **kwargs)


class _Patches:
    """All patches of a model; the latest is in force.

    Attributes:
        places: in the order in which they came.
        hidden: a ``generate`` that the model had of its own, or None.
    """

    def __init__(self, model: Any):
        self.model = model
        self.places: list[_Place] = []
        self.hidden = model.__dict__.get("generate")
        if isinstance(self.hidden, _Generate) and self.hidden.__self__ is not model:
            # `copy.copy` of a patched model has the very object that hides the first's
            self.hidden = self.hidden.patches.hidden
        self._generate = _Generate(self)

    @property
    def current(self) -> Handle | None:
        places = self.places  # once: other threads put in new lists
        return places[-1].handle if places else None

    @property
    def original(self) -> Any:
        if self.hidden is not None:
            return self.hidden
        return types.MethodType(type(self.model).generate, self.model)

    def add(self, place: _Place) -> None:
        if not self.places:
            self.model.__dict__["generate"] = self._generate
            self.model.__dict__[_HANDLE] = self
        self.places.append(place)

    def drop(self, places: list[_Place]) -> None:
        """Take places off, wherever they stand; the model is as it was once there is none."""
        if not self.places:
            return
        self.places = [place for place in self.places if place not in places]
        if self.places:
            return
        # past torch.nn.Module.__delattr__, which looks among parameters first
        del self.model.__dict__[_HANDLE]
        if self.model.__dict__.get("generate") is not self._generate:
            return  # somebody has put another in its place since
        del self.model.__dict__["generate"]
        if self.hidden is not None:
            self.model.__dict__["generate"] = self.hidden


def _patches(model: Any) -> _Patches | None:
    patches = model.__dict__.get(_HANDLE) if hasattr(model, "__dict__") else None
    # a shallow copy has those of the first, which are not to be taken off through it
    return patches if patches is not None and patches.model is model else None


def _current(model: Any) -> Handle | None:
    patches = _patches(model)
    return None if patches is None else patches.current


@contextmanager
def patched(
    model: Any, config: JacobiConfig | None = None, *, adapter: Any = None
) -> Iterator[Any]:
    """`patch` for the length of a ``with`` block; an earlier patch is back in force after it.

    Blocks may overlap, as those of several threads do: the latest that has not been left is in
    force, for all of them.
    """
    place = _Place(_handle(model, config, adapter))
    with _lock:
        patches = _patches(model) or _Patches(model)
        patches.add(place)
    try:
        yield model
    finally:
        with _lock:
            patches.drop([place])


def original_generate(model: Any) -> Any:
    """The ``generate`` that `model` has without our patch."""
    patches = _patches(model)
    if patches is None:
        check_model(model)
        found = model.generate
        return _Patches(model).original if isinstance(found, _Generate) else found
    return patches.original


def _patched_generate(patches: _Patches, *args: Any, **kwargs: Any) -> Any:
    # not what the model has by now: a wrapper that outlived these patches is what later ones hide,
    # and it would call itself
    model, handle, huggingface_generate = patches.model, patches.current, patches.original
    if handle is None:  # the patch is gone, and somebody has kept its `generate`
        return huggingface_generate(*args, **kwargs)
    if kwargs.get("custom_generate") is not None:  # `jacobi_decode` itself, or another loop
        return huggingface_generate(*args, **kwargs)
    adapter = kwargs.pop("adapter", None) or handle.adapter
    try:
        return run_generate(model, huggingface_generate, handle.config, adapter, args, kwargs)
    except UnsupportedOptionError as error:
        handle.warn_once(error)
        own = {*FIELDS, "generator", "row_ids"}  # which transformers does not know
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        # with an adapter the text is the base model's, whoever decodes it
        with nullcontext() if adapter is None else adapters_off(model):
            return huggingface_generate(*args, **kwargs)
