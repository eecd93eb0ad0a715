from __future__ import annotations

import pytest
import torch


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention asks for its softmax in fp32; in an fp64 model let it be fp64."""
    softmax = torch.nn.functional.softmax

    def exact(scores, dim=None, _stacklevel=3, dtype=None):
        return softmax(scores, dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)
