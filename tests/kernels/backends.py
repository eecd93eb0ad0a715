"""The backends and devices that the kernel tests run on, chosen by what this machine has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cllm_kernels
from cllm_kernels._backend import Op, interpreting

CANDIDATES = [
    *(("reference", "cpu"), ("cpp", "cpu"), ("triton", "cpu")),
    *(("reference", "cuda"), ("triton", "cuda"), ("cuda", "cuda")),
]


def everywhere(op: Op) -> Any:
    """Parametrises a test over (backend, device): each runs, or is skipped with the reason.

    "triton-cpu" is Triton's interpreter: test_other_paths.py runs it in a process of its own.
    """
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
    compiled = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")
    marks = {pair: [pytest.mark.gpu, no_gpu] for pair in CANDIDATES if pair[1] == "cuda"}
    marks["triton", "cpu"] = [compiled]
    parameters = [
        pytest.param(*pair, id="-".join(pair), marks=marks.get(pair, ()))
        for pair in CANDIDATES
        if pair[0] in op.implementations
    ]
    return pytest.mark.parametrize(("backend", "device"), parameters)


@contextlib.contextmanager
def running(op: Op, backend: str, device: str) -> Iterator[None]:
    """Runs the op on this backend inside, or skips the test with the reason why it cannot."""
    if device == "cuda" and backend == "triton" and interpreting():
        pytest.skip("TRITON_INTERPRET is set")
    if reason := op.unavailable(backend, torch.device(device)):
        pytest.skip(reason)
    with cllm_kernels.use_backend(backend):
        yield


def slow_interpreter(backend: str, device: str) -> bool:
    """Whether sizes should be kept small because Triton's interpreter runs the kernel."""
    return backend == "triton" and device == "cpu"
