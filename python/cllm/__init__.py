"""Decode any HuggingFace causal language model by Jacobi iteration, with the same output."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._on_import import when_transformers_loads

if TYPE_CHECKING:
    from .adapter import AdapterError, GatedAdapter
    from .decoding import (
        JacobiConfig,
        JacobiOutput,
        UnsupportedModelError,
        UnsupportedOptionError,
        generate,
        jacobi_decode,
    )
    from .evaluation import Evaluation, evaluate
    from .patching import Handle, patch, patched
    from .training.arguments import ConsistencyTrainingArguments
    from .training.config import ConsistencyConfig
    from .training.trainer import ConsistencyTrainer
    from .training_patch import TrainingHandle, patch_training
    from .trajectory import Iteration, Trajectory, TrajectoryError
    from .tuning import Tuning, tune
    from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ConsistencyConfig",
    "ConsistencyTrainer",
    "ConsistencyTrainingArguments",
    "Evaluation",
    "GatedAdapter",
    "Handle",
    "Iteration",
    "JacobiConfig",
    "JacobiOutput",
    "TrainingHandle",
    "Trajectory",
    "TrajectoryError",
    "Tuning",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "Verification",
    "evaluate",
    "generate",
    "jacobi_decode",
    "patch",
    "patch_training",
    "patched",
    "tune",
    "verify",
]

# attn_implementation="cllm" is there for any user, and at no cost for those who load no model
when_transformers_loads(lambda: import_module(".decoding.attention", __name__))

# torch and transformers take seconds to import, `cllm --help` should not: names load on first use
_HOMES = {
    ".adapter": ("AdapterError", "GatedAdapter"),
    ".evaluation": ("Evaluation", "evaluate"),
    ".patching": ("Handle", "patch", "patched"),
    ".training.arguments": ("ConsistencyTrainingArguments",),
    ".training.config": ("ConsistencyConfig",),
    ".training.trainer": ("ConsistencyTrainer",),
    ".training_patch": ("TrainingHandle", "patch_training"),
    ".trajectory": ("Iteration", "Trajectory", "TrajectoryError"),
    ".tuning": ("Tuning", "tune"),
    ".verification": ("Verification", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, ".decoding"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
