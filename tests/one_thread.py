"""One thread: tiny models gain nothing from more, and a busy machine makes threads that wait for
each other slow out of all proportion. A folder's conftest.py takes the fixture by importing it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
