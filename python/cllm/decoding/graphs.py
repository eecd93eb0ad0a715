"""CUDA graphs of decoding: one launch, where Python launches a thousand kernels.

Every shape of a forward over a window is fixed: the cache has its full size from the start, masks
and places are made on the device from the rows' lengths. So it is captured once and replayed with
other tokens and lengths. Where nothing in an iteration needs the host, the graph holds all of it,
see `static_loop`; else the forward alone (`GraphedForward.window`). Which calls get one is a
matter of `automatic`.

A model keeps its captures from one call to the next, `MOST_KEPT` of them, with the caches they
write to: `kept_bytes` says how much that is, `forget` lets go of it. Where a capture fails the call
goes on without one, and gives the same text.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..adapter import low_rank
from ..linears import _terms
from .cache import VIEW_STEP, round_up
from .capturing import Capture, capture, on_device, short_of_memory
from .forward import BlockForward, Layout
from .graph_key import forward_key
from .host_needs import NoHost
from .support import ModelTraits

if TYPE_CHECKING:
    from .static_loop import StaticIteration

# Each holds a KV cache and the activations of a forward.
MOST_KEPT = 4
# Failures that are remembered of a model, so that nobody runs into them again.
MOST_FAILURES = 64
DEVICES = ("cuda",)

logger = logging.getLogger("cllm")
Made = TypeVar("Made")


@dataclass
class Captured:
    """A forward that can be had again.

    Attributes:
        tokens: [B, n] or [B, C, n], lengths: [B]: what it reads.
        given: [B, n or v + n, V or H] or [B, C, n, V or H], written by `replay`.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    given: torch.Tensor
    replay: Callable[[], Any]


class GraphedForward(BlockForward):
    """A `BlockForward` that is captured, by the window or as a part of whole iterations.

    Attributes:
        by_window: a window is captured at its first forward and replayed from then on; False while
            whole iterations are captured, or could not be.
        iterations: those captured, by what is fixed in them; None: it could not be captured.
        automatic: nobody asked for a graph in the present call, or hears where there is none.
        key: of the present call, under which a failure is remembered; None: it is not.
        stays: is kept for further calls.

    Args:
        others: those of `BlockForward`.
    """

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others, fixed=True)
        self.model: Any = self.model
        self.adapter: Any = None
        self.by_window = True
        self.automatic = False
        self.key: tuple | None = None
        self.stays = True
        self.iterations: OrderedDict[tuple, StaticIteration | None] = OrderedDict()
        self._captured: dict[tuple[int | None, ...], Captured | None] = {}

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

    def candidate_windows(
        self, tokens: torch.Tensor, lengths: torch.Tensor, host_lengths: list[int]
    ) -> torch.Tensor:
        """As `BlockForward.candidate_windows`; what is returned is overwritten by the next one."""
        several = super().candidate_windows
        return self._forward(
            None, tokens, lengths, lambda ids, where: several(ids, where, host_lengths)
        )

    def _forward(
        self,
        verify: int | None,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        if not self.by_window:
            return run(tokens, lengths)
        key = (verify, *tokens.shape[1:])
        if key not in self._captured:
            own = tokens.clone(), lengths.clone()
            self._captured[key] = self.attempt(
                lambda: Captured(*own, *self.captured(lambda: run(*own))),
                f"forward over {list(tokens.shape)} tokens",
            )
        captured = self._captured[key]
        if captured is None:
            return run(tokens, lengths)
        captured.tokens.copy_(tokens)
        captured.lengths.copy_(lengths)
        captured.replay()
        return captured.given

    def captured(self, run: Callable[[], torch.Tensor]) -> Capture:
        """`capture` of something that runs this forward.

        Raises:
            RuntimeError, ValueError: it cannot be captured, or memory is short.
        """
        self._refuse()
        if self.automatic:
            run()  # what is made once, an adapter's casts on the device, say, is not to count
            with NoHost():
                run()
        given, replay = capture(run)
        return given, partial(_replayed, replay, _surroundings(self.model))

    def attempt(self, make: Callable[[], Made], what: str) -> Made | None:
        """What `make` makes by way of `captured`; None where that fails. Whoever asked for a graph
        is warned then.

        Args:
            what: names it in the warning.
        """
        try:
            return make()
        except (RuntimeError, ValueError, AttributeError, TypeError) as failure:
            reason = str(failure).strip().splitlines() or ["no message"]
            told = f"({type(failure).__name__}: {reason[0]})"
            short = short_of_memory(failure)
        # not while the failure is handled, which holds what was allocated on the way to it
        self._go_without(f"the {what} of {type(self.model).__name__}", told, short)
        return None

    def _go_without(self, what: str, reason: str, short: bool) -> None:
        """Remember and tell that there is no capture; where memory was short, there is none of this
        model any more."""
        if short:
            self.iterations.clear()
            self._captured.clear()
            let_go(self.model)
        made = (*self.iterations.values(), *self._captured.values())
        self.stays = not short and (not self.automatic or any(one is not None for one in made))
        if self.key is not None and (short or self.automatic):
            with _lock:
                failures = _failed.setdefault(self.model, OrderedDict())
                failures[self.key] = not self.automatic or failures.get(self.key, False)
                while len(failures) > MOST_FAILURES:
                    failures.popitem(last=False)
        if self.automatic:
            logger.info("%s could not be captured and goes on without a graph %s", what, reason)
            return
        warnings.warn(
            f"compile='graph': {what} could not be captured and goes on without a graph {reason}",
            stacklevel=2,
        )

    def _refuse(self) -> None:
        """Raises ValueError for what a capture would take down wrongly."""
        if self.plan.right_aligned:
            raise ValueError("its layout is right-aligned, at places that follow the text")
        places = sorted({str(parameter.device) for parameter in self.model.parameters()})
        if len(places) > 1:
            raise ValueError(f"its weights are on several devices: {', '.join(places)}")
        if torch.is_autocast_enabled(self.plan.device.type):
            raise ValueError("autocast is on, and lets go of its casts of the weights")

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache, and of what whole iterations work on."""
        found = [one.nbytes for one in self.iterations.values() if one is not None]
        return self.cache.nbytes + sum(found)


def _replayed(replay: Callable[[], Any], held: list[Any]) -> Any:
    """`replay`, which reads what `held` owns: for as long as somebody can call it."""
    return replay()


def _surroundings(model: Any) -> list[Any]:
    """What a call puts around the modules of `model` for an adapter: its hooks and terms. They hold
    casts of its weights, which a capture reads by address in later calls."""
    found: list[Any] = []
    for module in model.modules():
        found += _terms.get(module, ())
        for hook in module._forward_hooks.values():
            if getattr(hook, "__module__", None) == low_rank.__name__:
                found.append(hook)
    return found


_lock = threading.Lock()
# A forward that a call works with is not in here: nobody else may write to its cache.
_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, GraphedForward]] = (
    weakref.WeakKeyDictionary()
)


# Keys of calls that are not tried again; whether somebody who asked for graphs was told.
_failed: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, bool]] = weakref.WeakKeyDictionary()


def has_graphs(device: torch.device) -> bool:
    """Whether there are graphs on `device`."""
    return device.type in DEVICES


def check_device(device: torch.device) -> None:
    """Raises ValueError where there are no graphs."""
    if not has_graphs(device):
        raise ValueError(
            f"compile='graph' needs a CUDA device, but the model is on {device}; leave compile out"
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
    automatic: bool = False,
    call_key: tuple | None = None,
) -> Iterator[GraphedForward]:
    """A forward for one call, with the captures of earlier calls of its shape.

    Args:
        adapter: whose weights gated forwards add.
        automatic, call_key: see `GraphedForward`.
        others: of `BlockForward`.

    Raises:
        ValueError: not on a GPU.
    """
    check_device(device)
    shape: dict[str, Any] = dict(
        batch=batch,
        slots=round_up(slots, VIEW_STEP),
        device=device,
        position_limit=position_limit,
        layout=layout,
        head=head,
    )
    key = forward_key(model, **shape, adapter=adapter)
    with _lock:
        forward = _kept.setdefault(model, OrderedDict()).pop(key, None)
    if forward is None:
        forward = GraphedForward(model, traits, **shape)
        forward.adapter = adapter  # whose tensors a capture reads
    forward.model, forward.by_window, forward.stays = model, True, True
    forward.automatic, forward.key = automatic, call_key
    with on_device(device):
        yield forward
    # only whole calls put it back: one that failed may have failed in a capture
    forward.model = None  # or the model would be kept alive by what it is the key of
    if not forward.stays:
        return
    with _lock:
        kept = _kept.setdefault(model, OrderedDict())
        kept[key] = forward
        while len(kept) > MOST_KEPT:
            kept.popitem(last=False)


def failed(model: Any, call_key: tuple, automatic: bool) -> bool:
    """Whether a capture for such calls is not to be tried again: one failed, of which whoever asks
    for graphs was told."""
    with _lock:
        known = _failed.get(model) or OrderedDict()
        told = known.get(call_key)
        return told is not None and (told or automatic)


def forget(model: Any) -> None:
    """Let go of all captures of `model` and of their memory, and of what is known to fail."""
    with _lock:
        _kept.pop(model, None)
        _failed.pop(model, None)


def let_go(model: Any) -> None:
    """Make room: all captures of `model` go, and their memory back to the device."""
    with _lock:
        _kept.pop(model, None)
    gc.collect()
    torch.cuda.empty_cache()


def with_room(model: Any, run: Callable[[], None]) -> None:
    """`run`; where memory is short, once more without the captures that `model` keeps."""
    try:
        return run()
    except torch.OutOfMemoryError:
        if not kept_bytes(model):
            raise
    let_go(model)
    return run()


def kept_bytes(model: Any) -> int:
    """Bytes of the KV caches and states that captures of `model` keep; a capture's activations,
    which torch holds in a pool of its own, come on top."""
    with _lock:
        forwards = list(_kept.get(model, {}).values())
    return sum(forward.nbytes for forward in forwards)
