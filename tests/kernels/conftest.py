from __future__ import annotations

import pytest
import torch

from cllm_kernels.linear_argmax import native


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
