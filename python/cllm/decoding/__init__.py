"""Jacobi decoding of HuggingFace causal language models."""

from .config import JacobiConfig
from .decode import jacobi_decode
from .generate import generate
from .output import JacobiOutput
from .support import UnsupportedModelError, UnsupportedOptionError

__all__ = [
    "JacobiConfig",
    "JacobiOutput",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "generate",
    "jacobi_decode",
]
