"""Decode any HuggingFace causal language model by Jacobi iteration, with the same output."""

from __future__ import annotations

from .decoding import (
    JacobiConfig,
    JacobiOutput,
    UnsupportedModelError,
    UnsupportedOptionError,
    generate,
    jacobi_decode,
)
from .patching import Handle, patch, patched
from .trajectory import Iteration, Trajectory, TrajectoryError
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Handle",
    "Iteration",
    "JacobiConfig",
    "JacobiOutput",
    "Trajectory",
    "TrajectoryError",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "Verification",
    "generate",
    "jacobi_decode",
    "patch",
    "patched",
    "verify",
]
