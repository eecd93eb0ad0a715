from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.tiny_models import fresh_model
from tests.decoding.tokenizer import letters_tokenizer


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention asks for its softmax in fp32; in an fp64 model let it be fp64."""
    softmax = torch.nn.functional.softmax

    def exact(scores, dim=None, _stacklevel=3, dtype=None):
        return softmax(scores, dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight responses of the tiny Llama, as `cllm collect` stores them."""
    from .tiny_trajectories import store

    folder = tmp_path_factory.mktemp("trajectories")
    return store(folder / "llama", fresh_model("llama"), letters_tokenizer())


@pytest.fixture
def make_trainer(trajectories: Path, tmp_path: Path) -> Callable[..., Any]:
    """`runs.tiny_trainer` on those, with a folder of its own."""
    from .runs import tiny_trainer

    return partial(tiny_trainer, trajectories, tmp_path / "out")
