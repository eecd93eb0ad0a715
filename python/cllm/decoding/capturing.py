"""The capture of one function in a CUDA graph, and what torch needs around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

_WARM_UP = 2

Capture = tuple[torch.Tensor, Callable[[], Any]]
_capturing = threading.Lock()
# Failed half way. The allocator of pinned memory may hold their address.
_broken: list[Any] = []


def capture(run: Callable[[], torch.Tensor], pool: Any = None) -> Capture:
    """The result of `run`, and what computes it anew in the same place.

    Args:
        pool: of `new_pool`, for captures that are never replayed at once and whose results nobody
            reads behind another one's replay; None: memory of its own.

    Raises:
        RuntimeError: `run` does what cannot be captured, or memory is short.
    """
    with _capturing:  # all captures are made on one stream
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # kernels are compiled
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), new_pool() if pool is None else pool
        # puts the stream back, which torch leaves where a capture fails
        same = torch.cuda.stream(torch.cuda.current_stream())
        try:
            with same, _own_workspace(), _graph(graph, pool):
                given = run()
        except BaseException:
            _mend(graph, pool)
            raise
    return given, graph.replay


def new_pool() -> Any:
    """Memory for captures."""
    return torch.cuda.graph_pool_handle()


def _graph(graph: Any, pool: Any) -> AbstractContextManager[None]:
    """What other threads do meanwhile, allocate or read back, is theirs and breaks no capture."""
    made: AbstractContextManager[None] = torch.cuda.graph(
        graph, pool=pool, capture_error_mode="thread_local"
    )
    return made


def _mend(graph: Any, pool: Any) -> None:
    """Undo what torch leaves of a capture that failed half way."""
    device = torch.cuda.current_device()
    with suppress(RuntimeError):
        # raises where torch came to do it: else the allocator goes on asking this graph what is its
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        _broken.append(graph)
    # random numbers raise "Offset increment outside graph capture" until a capture succeeds
    same, other = torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.CUDAGraph()
    with suppress(RuntimeError), same, _graph(other, torch.cuda.graph_pool_handle()):
        torch.zeros(1, device="cuda")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Streams, and with them captures, are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _own_workspace() -> Iterator[None]:
    """cuBLAS keeps a workspace for each stream, and graphs are captured on the same one. What it
    has from an earlier graph is in that graph's memory, and gone with it: it is to ask for memory
    of the graph to come, and to forget it afterwards (pytorch/pytorch#193402)."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def short_of_memory(failure: BaseException | None) -> bool:
    """Whether memory ran out; the end of a capture that it broke off may have failed, too."""
    while failure is not None:
        if isinstance(failure, torch.OutOfMemoryError):
            return True
        failure = failure.__context__
    return False
