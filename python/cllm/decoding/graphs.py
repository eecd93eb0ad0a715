"""CUDA graphs of decoding: one launch, where Python launches a thousand kernels.

Every shape of a forward over a window is fixed: the cache has its full size from the start, masks
and places are made on the device from the rows' lengths. So it is captured once and replayed with
other tokens and lengths. Where nothing in an iteration needs the host, the graph holds all of it,
see `static_loop`; else the forward alone (`GraphedForward.window`). Which calls get one is a
matter of `automatic`.

A model keeps its captures from one call to the next, `MOST_KEPT` of them, with the caches they
write to (`shelf`): `kept_bytes` says how much that is, `forget` lets go of it. Where a capture
fails the call goes on without one, and gives the same text.
"""

from __future__ import annotations

import logging
import sys
import warnings
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
from .forward import BlockForward
from .graph_key import forward_key
from .host_needs import NoHost
from .layouts import Layout
from .prefill import Prefills, padded
from .shelf import (
    MOST_KEPT,
    Use,
    forget,
    in_use,
    kept_bytes,
    let_go,
    note_failure,
    put_back,
    take,
)
from .support import ModelTraits

if TYPE_CHECKING:
    from .static_loop import StaticIteration

DEVICES = ("cuda",)

__all__ = [
    "MOST_KEPT",
    "Captured",
    "GraphedForward",
    "check_device",
    "forget",
    "graphed_forward",
    "has_graphs",
    "kept_bytes",
]

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

    def run(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What it gives for these, overwritten by the next run."""
        self.tokens.copy_(tokens)
        self.lengths.copy_(lengths)
        self.replay()
        return self.given

    @property
    def nbytes(self) -> int:
        """Bytes of what it reads and writes."""
        return self.tokens.nbytes + self.lengths.nbytes + self.given.nbytes


class GraphedForward(BlockForward):
    """A `BlockForward` that is captured, by the window or as a part of whole iterations.

    Attributes:
        by_window: a window is captured at its first forward and replayed from then on; False while
            whole iterations are captured, or could not be.
        by_prefill: prefills are captured; False: this one's are few, or memory ran out over one.
        prefills: captured.
        iterations: those captured, by what is fixed in them; None: it could not be captured, and
            whoever asked was told.
        windows: captures by the window, by `window_key`; None: as above.
        most_windows: so many of them are kept, the latest.
        automatic: nobody asked for a graph in the present call, or hears where there is none.
        key: of the present call, under which a failure is remembered; None: it is not.
        stays: is kept for further calls.

    Args:
        others: those of `BlockForward`.
    """

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others, fixed=True)
        self.adapter: Any = None
        self.by_window = self.by_prefill = True
        self.prefills = Prefills()
        self.automatic = False
        self.key: tuple | None = None
        self.stays = True
        self.iterations: OrderedDict[tuple, StaticIteration | None] = OrderedDict()
        self.windows: OrderedDict[tuple[int | None, ...], Captured | None] = OrderedDict()
        self.most_windows = MOST_KEPT
        # windows whose capture failed with nobody told
        self._untold: set[tuple[int | None, ...]] = set()

    def enter(self, model: Any, automatic: bool, key: tuple | None) -> None:
        """Be the forward of a call."""
        self.model, self.automatic, self.key = model, automatic, key
        self.by_window = self.stays = True
        if not automatic:  # who asks for a graph is to have it, or to hear why not
            self._untold.clear()

    def prefill(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """As `BlockForward.prefill`."""
        width, plain = self.prefill_width(input_ids), super().prefill
        if width is None or not self.by_prefill:
            return plain(input_ids, lengths)
        given = padded(input_ids, width), lengths

        def make() -> Captured | None:
            own = given[0].clone(), lengths.clone()

            def run() -> torch.Tensor:
                plain(*own)
                return own[1]

            return self.attempt(
                lambda: Captured(*own, *self.captured(run, self.prefills.capture)),
                f"forward over prompts of {list(own[0].shape)} tokens",
                alone=True,
            )

        captured = self.prefills.find(width, make, asked=not self.automatic)
        if captured is None:
            return plain(*given)
        captured.run(*given)

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
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        host_lengths: list[int],
        checked: int | None = None,
    ) -> torch.Tensor:
        """As `BlockForward.candidate_windows`; what is returned is overwritten by the next one."""
        several = super().candidate_windows
        return self._forward(
            checked, tokens, lengths, lambda ids, where: several(ids, where, host_lengths, checked)
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
        key = window_key(verify, *tokens.shape[1:])
        if key in self._untold:
            return run(tokens, lengths)
        if key not in self.windows:
            own = tokens.clone(), lengths.clone()
            made = self.attempt(
                lambda: Captured(*own, *self.captured(lambda: run(*own))),
                f"forward over {list(tokens.shape)} tokens",
            )
            if made is None and self.automatic:
                self._untold.add(key)
                return run(tokens, lengths)
            self.windows[key] = made
            while len(self.windows) > self.most_windows:
                self.windows.popitem(last=False)
        self.windows.move_to_end(key)
        captured = self.windows[key]
        return run(tokens, lengths) if captured is None else captured.run(tokens, lengths)

    def captured(
        self,
        run: Callable[[], torch.Tensor],
        capture_by: Callable[[Callable[[], torch.Tensor]], Capture] | None = None,
    ) -> Capture:
        """`capture` of something that runs this forward.

        Raises:
            one of `_failures`: it cannot be captured, or memory is short.
        """
        self._refuse()
        if self.automatic:
            run()  # what is made once, an adapter's casts on the device, say, is not to count
            with NoHost():
                run()
        given, replay = (capture_by or capture)(run)
        return given, partial(_replayed, replay, _surroundings(self.model))

    def attempt(self, make: Callable[[], Made], what: str, *, alone: bool = False) -> Made | None:
        """What `make` makes by way of `captured`; None where that fails. Whoever asked for a graph
        is warned then.

        Args:
            what: names it in the warning.
            alone: what else the call has captured does not depend on it, so that nobody is warned.
        """
        try:
            return make()
        except _failures() as failure:
            reason = str(failure).strip().splitlines() or ["no message"]
            told = f"({type(failure).__name__}: {reason[0]})"
            short = short_of_memory(failure)
        # not while the failure is handled, which holds what was allocated on the way to it
        self._go_without(f"the {what} of {type(self.model).__name__}", told, short, alone)
        return None

    def _go_without(self, what: str, reason: str, short: bool, alone: bool) -> None:
        """Remember and tell that there is no capture; where memory was short, there is none of this
        model any more."""
        if short:
            self.iterations.clear()
            self.windows.clear()
            self.prefills.clear()
            self.by_prefill = self.by_prefill and not alone
            let_go(self.model)
        if not alone:
            made = (*self.iterations.values(), *self.windows.values())
            self.stays = not short and (not self.automatic or any(one is not None for one in made))
            if self.key is not None and (short or self.automatic):
                note_failure(self.model, self.key, told=not self.automatic)
        if alone or self.automatic:
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
        """Bytes of the KV cache, and of what iterations and windows read and write."""
        made = (*self.iterations.values(), *self.windows.values())
        written = sum(one.nbytes for one in made if one is not None)
        return self.cache.nbytes + self.prefills.nbytes + written


def window_key(verify: int | None, *shape: int) -> tuple[int | None, ...]:
    """Under which the forward over windows [B, *shape] is kept; `verify`: as a gated one, so many
    tokens of the window, or of several windows, are checked."""
    return verify, *shape


def _failures() -> tuple[type[BaseException], ...]:
    """What a capture may fail with: what torch raises, and what models do that meet tensors which
    they did not expect."""
    kinds = (RuntimeError, ValueError, AttributeError, TypeError, LookupError)
    # Triton's own come from `Exception`; where it was not imported nothing raises them
    triton = getattr(sys.modules.get("triton.errors"), "TritonError", None)
    return kinds if triton is None else (*kinds, triton)


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
    nbytes: int = 0,
) -> Iterator[BlockForward]:
    """A forward for one call, with the captures of earlier calls of its shape.

    Args:
        adapter: whose weights gated forwards add.
        automatic: see `GraphedForward`; call_key: `key` there, whose first part is the forward's.
        nbytes: what its cache takes, as far as known.
        others: of `BlockForward`.

    Yields:
        A `GraphedForward`; one without captures where nobody asked for them and another call works
        with those of this shape.

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
    key = forward_key(model, **shape, adapter=adapter) if call_key is None else call_key[0]
    with in_use(model, Use(key, nbytes, device), alone=automatic) as free:
        if not free:
            yield BlockForward(model, traits, **shape, fixed=True)
            return
        forward = take(model, key)
        if forward is None:
            forward = GraphedForward(model, traits, **shape)
            forward.adapter = adapter  # whose tensors a capture reads
        forward.enter(model, automatic, call_key)
        with on_device(device):
            yield forward
        # only whole calls put it back: one that failed may have failed in a capture
        forward.model = None  # or the model would be kept alive by what it is the key of
        if forward.stays:
            put_back(model, key, forward)
