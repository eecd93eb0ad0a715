"""Which implementation of an op runs: the registry behind `backends()` and `use_backend()`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from cllm_kernels._native import missing_cuda_reason, missing_reason

BACKENDS = ("reference", "cpp", "cuda", "triton")
DEVICES = ("cpu", "cuda")


class BackendError(RuntimeError):
    """A backend was asked for that does not exist, or cannot run here."""


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def _triton_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (it exists for Linux; pip install triton)"
    try:
        import_module("triton")
    except Exception as error:  # a broken installation raises what it likes
        return f"triton does not import: {error}"
    return None


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@dataclass
class Op:
    """One op and its implementations.

    `implementations` maps a backend's name to a loader that returns the function (or what else the
    op calls), so that a backend is imported only when it is used. `preference` orders backends per
    device type for "auto". `cuda_function` is what the CUDA backend calls of the native module;
    by default it has the op's name.
    """

    name: str
    implementations: Mapping[str, Callable[[], Any]]
    preference: Mapping[str, tuple[str, ...]]
    cuda_function: str | None = None
    _resolved: dict[tuple[str, torch.device], Any] = field(default_factory=dict)
    _native: dict[tuple[str, torch.device], bool] = field(default_factory=dict)

    def unavailable(self, backend: str, device: torch.device) -> str | None:
        """Why this backend cannot run on this device, in one line; None if it can."""
        if backend not in self.implementations:
            return f"there is no {backend} implementation of {self.name}"
        if backend == "reference":
            return None
        if backend == "cpp":
            if device.type != "cpu":
                return "the C++ kernels run on CPU tensors"
            return missing_reason()
        if backend == "cuda":
            if device.type != "cuda":
                return "the CUDA C++ kernels run on CUDA tensors"
            if torch.version.hip is not None:
                return "this torch is built for ROCm"
            if reason := missing_cuda_reason(self.cuda_function or f"{self.name}_cuda"):
                return reason
            if torch.cuda.is_available() and _capability(device.index) < (8, 0):
                return "the CUDA C++ kernels need compute capability 8.0 or newer"
            return None
        if device.type == "cpu" and not interpreting():
            return "Triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
        return _triton_reason()

    def choose(self, device: torch.device, choice: str) -> str:
        """The backend that `choice` means on this device. Raises BackendError if it cannot run."""
        if choice == "auto":
            order = self.preference.get(device.type, ("reference",))
            return next(name for name in order if self.unavailable(name, device) is None)
        if reason := self.unavailable(choice, device):
            raise BackendError(
                f"{self.name}: backend {choice!r} cannot run on {device.type} tensors: {reason}"
            )
        return choice

    def resolve(self, device: torch.device) -> Any:
        """What runs on tensors of this device under the present choice."""
        key = (_choice, device)
        function = self._resolved.get(key)
        if function is None:
            function = self.implementations[self.choose(device, _choice)]()
            self._resolved[key] = function
        return function

    def in_float64(self, device: torch.device) -> Any:
        """The reference, for float64 tensors, which no kernel takes. BackendError if the present
        choice is a kernel."""
        if _choice not in ("auto", "reference"):
            raise BackendError(
                f"{self.name}: backend {_choice!r} cannot run on float64 tensors; only the "
                "reference can"
            )
        return self.implementations["reference"]()

    def native_threads(self, device: torch.device) -> int:
        """How many threads the direct native call may use; 0 where another backend was resolved.

        Nothing is resolved here, so a device's first call goes the long way.
        """
        name = self._native.get((_choice, device))
        if name is None:
            function = self._resolved.get((_choice, device))
            if function is None:
                return 0
            name = function.__module__.endswith(".native")
            self._native[_choice, device] = name
        return torch.get_num_threads() if name else 0


_ops: dict[str, Op] = {}
_choice = "auto"


def register(op: Op) -> Op:
    _ops[op.name] = op
    return op


def registered() -> Mapping[str, Op]:
    """Every op of this package, by name."""
    return _ops


def _valid(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise BackendError(
            f"{source}: unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}"
        )
    return name


def _usable_somewhere(name: str) -> str | None:
    """None if some op can run this backend on some device of this machine, else why not."""
    if name in ("auto", "reference"):
        return None
    device = torch.device("cuda" if name == "cuda" else "cpu")
    if name == "triton" and not interpreting():
        device = torch.device("cuda")
    reasons = [op.unavailable(name, device) for op in _ops.values() if name in op.implementations]
    if None not in reasons:
        return reasons[0] if reasons else f"no op has a {name} implementation"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


class use_backend:
    """Chooses the backend of all ops of this process, for good or for a `with` block.

    Args:
        name: "reference", "cpp", "cuda", "triton", or "auto" (the fastest one there is for the
            device of the tensors; the reference where nothing else was built).

    A backend that this machine cannot run at all raises BackendError here; one that cannot run on
    the tensors of a call raises it there. Nothing falls back silently. The environment variable
    CLLM_KERNELS_BACKEND makes the choice at import.

        use_backend("reference")
        with use_backend("cpp"): ...
    """

    def __init__(self, name: str) -> None:
        global _choice
        _valid(name, "use_backend")
        if reason := _usable_somewhere(name):
            raise BackendError(f"use_backend: {name!r} is not available: {reason}")
        self._previous = _choice
        self.name = name
        _choice = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _choice
        _choice = self._previous

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


def choose_from_environment() -> None:
    """Takes the choice of CLLM_KERNELS_BACKEND, if set. BackendError if it cannot be had."""
    name = os.environ.get("CLLM_KERNELS_BACKEND", "").strip()
    if name:
        global _choice
        _choice = _valid(name, "CLLM_KERNELS_BACKEND")
        if reason := _usable_somewhere(name):
            raise BackendError(f"CLLM_KERNELS_BACKEND={name} is not available: {reason}")


def current_backend() -> str:
    """The present choice: a backend's name, or "auto"."""
    return _choice


def backends() -> dict[str, dict[str, dict[str, str | None]]]:
    """What can run: {op: {device type: {backend: None, or why it cannot}}}.

    Under the key "auto" stands the name of the backend that the automatic choice takes, None where
    torch finds no such device.
    """
    report: dict[str, dict[str, dict[str, str | None]]] = {}
    for op in _ops.values():
        report[op.name] = {}
        for device_type in DEVICES:
            device = torch.device(device_type)
            entry = {name: op.unavailable(name, device) for name in BACKENDS}
            entry["auto"] = op.choose(device, "auto")
            if device_type == "cuda" and not torch.cuda.is_available():
                entry = dict.fromkeys(BACKENDS, "torch finds no CUDA device") | {"auto": None}
            report[op.name][device_type] = entry
    return report
