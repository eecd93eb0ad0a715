"""CUDA graphs of decoding: one launch, where Python launches a thousand kernels.

Every shape of a forward over a window is fixed: the cache has its full size from the start, masks
and places are made on the device from the rows' lengths. So it is captured once and replayed with
other tokens and lengths. Where nothing in an iteration needs the host, the graph holds all of it,
see `static_loop`; else the forward alone (`GraphedForward.window`).

A model keeps its captures from one call to the next, `MOST_KEPT` of them, with the caches they
write to. Where a capture fails the call goes on without one, says so once, and gives the same text.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cllm_kernels import current_backend

from ..adapter import low_rank
from ..linears import _terms
from .attention import chosen_implementation
from .cache import VIEW_STEP, round_up
from .forward import BlockForward, Layout
from .support import ModelTraits

if TYPE_CHECKING:
    from .static_loop import StaticIteration

# Each holds a KV cache and the activations of a forward.
MOST_KEPT = 4
DEVICES = ("cuda",)
_WARM_UP = 2

Capture = tuple[torch.Tensor, Callable[[], Any]]


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


_capturing = threading.Lock()


def capture(run: Callable[[], torch.Tensor]) -> Capture:
    """The result of `run`, and what computes it anew in the same place.

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
        graph = torch.cuda.CUDAGraph()
        with _own_workspace(), torch.cuda.graph(graph):
            given = run()
    return given, graph.replay


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


class GraphedForward(BlockForward):
    """A `BlockForward` that is captured, by the window or as a part of whole iterations.

    Attributes:
        by_window: a window is captured at its first forward and replayed from then on; False while
            whole iterations are captured, or could not be.
        iterations: those captured, by what is fixed in them; None: it could not be captured.

    Args:
        others: those of `BlockForward`.
    """

    def __init__(self, *args: Any, **others: Any):
        super().__init__(*args, **others, fixed=True)
        self.model: Any = self.model
        self.adapter: Any = None
        self.by_window = True
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
            found = self.attempt(lambda: run(*own), f"forward over {list(tokens.shape)} tokens")
            self._captured[key] = None if found is None else Captured(*own, *found)
        captured = self._captured[key]
        if captured is None:
            return run(tokens, lengths)
        captured.tokens.copy_(tokens)
        captured.lengths.copy_(lengths)
        captured.replay()
        return captured.given

    def attempt(self, run: Callable[[], torch.Tensor], what: str) -> Capture | None:
        """`capture` of something that runs this forward; None, and a warning, where that fails.

        Args:
            what: names it in the warning.
        """
        try:
            self._refuse()
            given, replay = capture(run)
        except (RuntimeError, ValueError, AttributeError, TypeError) as failure:
            reason = str(failure).strip().splitlines() or ["no message"]
            warnings.warn(
                f"compile='graph': the {what} of {type(self.model).__name__} could not be captured "
                f"and goes on without a graph ({type(failure).__name__}: {reason[0]})",
                stacklevel=2,
            )
            return None
        return given, partial(_replayed, replay, _surroundings(self.model))

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


def _tuner_states(model: Any) -> list[tuple[bool, str, bool, str]]:
    """Which adapters the PEFT layers of `model` apply, and how much; to switch them changes no
    address."""
    return [
        (
            *(module._disable_adapters, str(module.active_adapters), module.merged),
            str(getattr(module, "scaling", None)),
        )
        for module in model.modules()
        if hasattr(module, "_disable_adapters")
    ]


def _hooks(model: Any) -> tuple[int, ...]:
    """Those that somebody else put on modules of `model`; an adapter's are not among them."""
    return tuple(
        id(hook)
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if getattr(hook, "__module__", None) != low_rank.__name__
    )


def _adapter_state(adapter: Any) -> int | None:
    """Where its weights are and how often they were changed in place; an adapter made anew around
    the same tensors has the same captures."""
    if adapter is None:
        return None
    pairs = adapter.weights.items()
    return hash(
        tuple(
            (name, pair.scaling, *((t.data_ptr(), low_rank.version(t)) for t in (pair.a, pair.b)))
            for name, pair in pairs
        )
    )


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
) -> Iterator[GraphedForward]:
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
    # what else decides which kernels run, and whether calls may write to each other's tensors
    modes = (
        chosen_implementation(model.config.get_text_config()),
        current_backend(),
        torch.is_autocast_enabled(device.type),
        torch.is_inference_mode_enabled(),
        *_tuner_states(model),
        _hooks(model),
        _adapter_state(adapter),
    )
    key = (
        *(batch, slots, device, position_limit, layout, head is None, weights),
        *modes,
    )
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
    forward.model, forward.by_window = model, True
    # streams, and with them captures, are those of the current device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
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
    """Bytes of the KV caches and states that captures of `model` keep; a capture's activations,
    which torch holds in a pool of its own, come on top."""
    with _lock:
        forwards = list(_kept.get(model, {}).values())
    return sum(forward.nbytes for forward in forwards)
