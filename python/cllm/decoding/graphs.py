"""CUDA graphs of the forward over a window: one launch, where Python launches a thousand kernels.

Every shape of such a forward is fixed: the cache has its full size from the start, masks and places
are made on the device from the rows' lengths. So a forward is captured once for each width and
replayed with other tokens and lengths. What stands around it, predictions and the fixed-point step,
is a handful of launches and works on the logits as ever.

A model keeps its captures from one call to the next, `MOST_KEPT` of them, with the caches they
write to. Where a capture fails the call goes on without one, says so once, and gives the same text.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cache import VIEW_STEP, round_up
from .forward import BlockForward, Layout
from .support import ModelTraits

# Each holds a KV cache and the activations of a forward.
MOST_KEPT = 4
DEVICES = ("cuda",)
_WARM_UP = 2


@dataclass
class Captured:
    """A forward that can be had again.

    Attributes:
        tokens: [B, n], lengths: [B]: what it reads.
        given: [B, n or v + n, V or H], written by `replay`.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    given: torch.Tensor
    replay: Callable[[], Any]


def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], Any]]:
    """The result of `run`, and what computes it anew in the same place.

    Raises:
        RuntimeError: `run` does what cannot be captured, or memory is short.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):  # kernels are compiled, libraries make their workspaces
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    return given, graph.replay


class GraphedForward(BlockForward):
    """A `BlockForward` whose windows are captured at their first forward.

    Args:
        others: those of `BlockForward`.
    """

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others, fixed=True)
        self.model: Any = self.model
        self.adapter: Any = None
        self._captured: dict[tuple[int | None, int], Captured | None] = {}

    def window(
        self, tokens: torch.Tensor, lengths: torch.Tensor, host_lengths: list[int]
    ) -> torch.Tensor:
        """As `BlockForward.window`; what is returned is overwritten by the next forward."""
        plain = super().window
        return self._forward(
            None, tokens, lengths, lambda ids, where: plain(ids, where, host_lengths)
        )

    def gated_window(
        self, tokens: torch.Tensor, verify: int, lengths: torch.Tensor, host_lengths: list[int]
    ) -> torch.Tensor:
        """As `BlockForward.gated_window`; what is returned is overwritten by the next forward."""
        gated = super().gated_window
        return self._forward(
            verify, tokens, lengths, lambda ids, where: gated(ids, verify, where, host_lengths)
        )

    def _forward(
        self,
        verify: int | None,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        key = (verify, tokens.shape[1])
        if key not in self._captured:
            self._captured[key] = self._capture(tokens.clone(), lengths.clone(), run)
        captured = self._captured[key]
        if captured is None:
            return run(tokens, lengths)
        captured.tokens.copy_(tokens)
        captured.lengths.copy_(lengths)
        captured.replay()
        return captured.given

    def _capture(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Captured | None:
        try:
            if self.plan.right_aligned:
                raise ValueError("its layout is right-aligned, at places that follow the text")
            given, replay = capture(lambda: run(tokens, lengths))
        except (RuntimeError, ValueError, AttributeError, TypeError) as failure:
            reason = str(failure).strip().splitlines() or ["no message"]
            warnings.warn(
                f"compile='graph': the forward of {type(self.model).__name__} over "
                f"{list(tokens.shape)} tokens could not be captured and goes on without a graph "
                f"({type(failure).__name__}: {reason[0]})",
                stacklevel=2,
            )
            return None
        return Captured(tokens, lengths, given, replay)


_lock = threading.Lock()
# A forward that a call works with is not in here: nobody else may write to its cache.
_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, GraphedForward]] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def graphed_forward(
    model: Any,
    traits: ModelTraits,
    *,
    batch: int,
    slots: int,
    device: torch.device,
    position_limit: int | None,
    layout: Layout,
    head: Any = None,
    adapter: Any = None,
) -> Iterator[BlockForward]:
    """A forward for one call, with the captures of earlier calls of its shape.

    Args:
        adapter: whose weights gated forwards add.
        others: of `BlockForward`.

    Raises:
        ValueError: not on a GPU.
    """
    if device.type not in DEVICES:
        raise ValueError(
            f"compile='graph' needs a CUDA device, but the model is on {device}; leave compile out"
        )
    slots = round_up(slots, VIEW_STEP)
    # a capture reads weights by their address, and the adapter's, which it therefore keeps alive
    weights = hash(tuple(parameter.data_ptr() for parameter in model.parameters()))
    key = (batch, slots, device, position_limit, layout, head is None, weights, id(adapter))
    with _lock:
        forward = _kept.setdefault(model, OrderedDict()).pop(key, None)
    if forward is None:
        forward = GraphedForward(
            model,
            traits,
            batch=batch,
            slots=slots,
            device=device,
            position_limit=position_limit,
            layout=layout,
            head=head,
        )
        forward.adapter = adapter
    forward.model = model
    yield forward
    # only whole calls put it back: one that failed may have failed in a capture
    forward.model = None  # or the model would be kept alive by what it is the key of
    with _lock:
        kept = _kept.setdefault(model, OrderedDict())
        kept[key] = forward
        while len(kept) > MOST_KEPT:
            kept.popitem(last=False)


def forget(model: Any) -> None:
    """Let go of all captures of `model`, and of their memory."""
    with _lock:
        _kept.pop(model, None)


def kept_bytes(model: Any) -> int:
    """Bytes of the KV caches that captures of `model` keep; a capture's activations, which torch
    holds in a pool of its own, come on top."""
    with _lock:
        forwards = list(_kept.get(model, {}).values())
    return sum(forward.cache.nbytes for forward in forwards)
