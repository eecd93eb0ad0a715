"""The native module _C: loaded if it was built, and the record of its build."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# Before _C: torch's wheel brings its own libgomp.so.1, and whichever library of that name is loaded
# first serves both. With torch first, _C and torch share one pool of threads.
import torch  # noqa: F401

_RECORD = Path(__file__).with_name("_build_info.json")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("cllm_kernels._C"), None
    except ModuleNotFoundError:
        return None, None
    except ImportError as error:
        return None, f"the native module is there but does not load: {error}"


_module, _load_error = _load()


def build_info() -> dict[str, Any]:
    """What was built, and why something was not.

    Returns a dict: `cpu`, `openmp`, `cuda` (bool), `cuda_archs` (list such as ["sm_80", "sm_90"]),
    `cpu_reason`, `openmp_reason`, `cuda_reason` (one line, or None where the part was built),
    `loaded` (whether the native module works in this process), `isa` ("avx512", "avx2", "scalar" or
    None: what the CPU kernels use on this machine), `bf16_dot` (whether they multiply bfloat16
    without widening it, in VDPBF16PS) and, after a build, `compiler`.
    """
    info: dict[str, Any] = {
        "cpu": False,
        "openmp": False,
        "cuda": False,
        "cuda_archs": [],
        "cpu_reason": "the package was not installed, so nothing was compiled (run pip install)",
        "openmp_reason": None,
        "cuda_reason": "the package was not installed, so nothing was compiled (run pip install)",
    }
    if _RECORD.is_file():
        info.update(json.loads(_RECORD.read_text()))
    if _module is None and info["cpu"]:
        info["cpu_reason"] = _load_error or "the native module was built but has been removed"
    info["loaded"] = _module is not None
    info["isa"] = isa()
    info["bf16_dot"] = bf16_dot()
    return info


def isa() -> str | None:
    """The instructions that the CPU kernels use here: "avx512", "avx2" or "scalar"; None: none."""
    return _module.isa() if _module is not None else None


def bf16_dot() -> bool:
    """Whether the CPU kernels multiply bfloat16 as it is here, so that few rows cost about one."""
    return _module is not None and _module.bf16_dot()


def native_module() -> Any:
    """The loaded _C, or None."""
    return _module


def missing_reason() -> str | None:
    """Why the CPU kernels are missing, in one line; None if they are there."""
    if _module is not None:
        return None
    return str(_load_error or build_info()["cpu_reason"] or "the native module was not built")


def missing_cuda_reason(function: str) -> str | None:
    """Why _C has no CUDA kernel of this name, in one line; None if it has."""
    if _module is None:
        return missing_reason()
    if hasattr(_module, function):
        return None
    return str(build_info()["cuda_reason"] or "built without CUDA kernels")
