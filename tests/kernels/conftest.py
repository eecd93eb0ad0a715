from __future__ import annotations

import pytest
import torch

from cllm_kernels.linear_argmax import native
from tests.kernels.backends import interpreting


def _patch_once_per_launch() -> None:
    """Makes Triton's interpreter twice as fast, and changes nothing of what it computes.

    At a launch it puts its own functions into triton.language, and again at each call of one jitted
    function from another: a search through all of triton.language, which mostly finds them there.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_lang(function):
        names = function.__globals__.values()
        seen = (package for package in (tl, tl.core) if any(one is package for one in names))
        if any(tl.core.is_builtin(package.load) for package in seen):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


if interpreting():
    _patch_once_per_launch()


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN or a large negative number, so that what is not written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
                return tensor
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype is torch.bool else -113)

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=["few", "many"])
def both_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test of linear_argmax twice: with the CPU's product of few rows, and that of many."""
    if request.param == "many":
        monkeypatch.setattr(native, "_FEW", 0)
