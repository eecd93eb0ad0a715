"""Forwards over windows that inductor has compiled, on a CPU.

Between its matrix products a forward of few rows is dozens of small operations a layer, each of
them too short to be worth its call. Native layers (`layers`) are one call instead, for the families
that have them; for all others ``compile="inductor"`` lets `torch.compile` fuse what lies between
the products, at a cache of fixed size, so that a shape is compiled once. The products themselves
stay `cllm_kernels.block_linear`'s: the graph's linear layers of few rows are replaced before
inductor sees them.

Compiling takes some tens of seconds for each shape, which is why nobody gets it unasked.
"""

from __future__ import annotations

import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..linears import DTYPES, block_linears, most_rows
from ..uncompiled import any_compiled
from .cache import RaggedCache, round_up
from .forward import BlockForward, Masks
from .layouts import Layout
from .support import ModelTraits, model_device

# A cache's size is a multiple of so many slots: attention goes over all of them, and every size is
# compiled for itself.
_STEP = 256
# Compiled forwards that a model keeps, the latest.
MOST_KEPT = 8

_lock = threading.Lock()
# By model, then by what is fixed in them. A model's forward is one code object for all of its class
# and all shapes, and dynamo gives up on a code object after a few; each of these has its own.
# None: it could not be compiled.
_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, Callable[..., Any] | None]] = (
    weakref.WeakKeyDictionary()
)


def check_compilable(model: Any) -> None:
    """Raises ValueError where ``compile="inductor"`` cannot be: on a GPU, or compiled already."""
    device = model_device(model)
    if device.type != "cpu":
        raise ValueError(
            f"compile='inductor' is for models on a CPU, but this one is on {device}; leave "
            "compile out, which captures CUDA graphs"
        )
    if any_compiled(model):
        raise ValueError(
            "compile='inductor' compiles the model by itself, but torch.compile was at this one "
            "already; leave compile out, or pass a model that it was not at"
        )


class CompiledForward(BlockForward):
    """A `BlockForward` whose forwards over windows are compiled, as far as they can be.

    Args:
        layout: one whose attention is "compiled"; with any other this is a plain forward.
        others: those of `BlockForward`.
    """

    def __init__(
        self, model: Any, traits: ModelTraits, *, slots: int, layout: Layout, **others: Any
    ):
        shape: dict[str, Any] = dict(slots=round_up(slots, _STEP), layout=layout, **others)
        super().__init__(model, traits, **shape, fixed=True)
        # tensors that share memory and are written to are one to the compiler, and copied
        self.plan.storage = None
        self._seen: _SeenCache | None = None
        problem = None
        if layout.attention != "compiled":
            problem = f"its layout is {layout}"
        elif torch.is_autocast_enabled(self.plan.device.type):
            problem = "autocast is on, and would multiply in another dtype than block_linear"
        self._compiles = self.plan.indexed = problem is None
        if problem is not None:
            _warn(model, problem)

    def prefill(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """As `BlockForward.prefill`."""
        # which the layout leaves out, so that they are not traced
        with block_linears(self.model):
            super().prefill(input_ids, lengths)

    def prefill_width(self, input_ids: torch.Tensor) -> int | None:
        """As `BlockForward.prefill_width`: prompts are not compiled, and so not padded."""
        return None

    def _logits(self, tokens: torch.Tensor, offsets: torch.Tensor, masks: Masks) -> torch.Tensor:
        # a prompt of one token has left no storage yet
        if not self._compiles or not len(self.cache):
            return self._uncompiled(tokens, offsets, masks)
        if self._seen is None:
            self._seen = _SeenCache(self.cache)
        assert self.plan.slots is not None
        self._seen.at(self.plan.slots)
        call = self._arguments(tokens, offsets, masks)
        call[self.traits.cache_argument] = self._seen
        key = tokens.shape, self.plan.capacity, self._seen.shapes, self.model.dtype
        run = _compiled(self.model, (*key, torch.get_num_threads()))
        if run is not None:
            try:
                return run(self.model, call)
            except _FAILURES as failure:
                _fail(self.model, run)
                _warn(self.model, _reason(failure))
        self._compiles = False
        # what a failed one wrote is written again, to the same slots
        return self._uncompiled(tokens, offsets, masks)

    def _uncompiled(
        self, tokens: torch.Tensor, offsets: torch.Tensor, masks: Masks
    ) -> torch.Tensor:
        with block_linears(self.model):
            return super()._logits(tokens, offsets, masks)


# What compiling fails with: dynamo's and inductor's own errors are RuntimeErrors, the others come
# from models that meet what they did not expect.
_FAILURES = (
    RuntimeError,
    ValueError,
    AttributeError,
    TypeError,
    LookupError,
    AssertionError,
    OSError,
)


def _warn(model: Any, reason: str) -> None:
    warnings.warn(
        f"compile='inductor': the forward of {type(model).__name__} could not be compiled and goes "
        f"on as it is ({reason})",
        stacklevel=2,
    )


class _SeenLayer(CacheLayerMixin):
    """A layer of the ragged cache, as compiled code is to see it: nothing of it changes from
    forward to forward but what the tensors hold."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values  # [B, capacity, heads, D]
        self.slots: torch.Tensor | None = None  # [B * n]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, *others: Any) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [B, heads, n, D]; return all that attention sees."""
        assert self.keys is not None and self.values is not None and self.slots is not None
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            flat = storage.view(-1, *storage.shape[2:])
            flat.index_copy_(0, self.slots, states.transpose(1, 2).flatten(0, 1))
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[1], 0

    def get_seq_length(self, *args: Any) -> int:
        # that of `RaggedLayer`, with which the model was probed
        assert self.keys is not None and self.slots is not None
        return self.keys.shape[1] - self.slots.numel() // self.keys.shape[0]

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class _SeenCache(Cache):
    """A `RaggedCache` of full size, as compiled code is to see it."""

    def __init__(self, cache: RaggedCache):
        self._seen = [_SeenLayer(*layer.stored()) for layer in cache.ragged]
        super().__init__(layers=list(self._seen))
        self.shapes = tuple(tuple(kept.shape) for one in cache.ragged for kept in one.stored())

    def at(self, slots: torch.Tensor) -> None:
        """The coming forward writes to `slots` [B * n], flat indices."""
        for layer in self._seen:
            layer.slots = slots


def _forward(model: Any, call: dict[str, Any]) -> torch.Tensor:
    return model(**call).logits


def _compiled(model: Any, key: tuple) -> Callable[..., Any] | None:
    """`_forward` compiled for this model and what `key` says of the shapes; None: that failed in an
    earlier call."""
    with _lock:
        kept = _kept.setdefault(model, OrderedDict())
        if key not in kept:
            own = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
            kept[key] = torch.compile(own, backend=_backend, dynamic=False)
            while len(kept) > MOST_KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def _fail(model: Any, run: Callable[..., Any]) -> None:
    """Do not try this one again."""
    with _lock:
        kept = _kept[model]
        for key in [key for key, one in kept.items() if one is run]:
            kept[key] = None


def _reason(failure: BaseException) -> str:
    """The first line of what went wrong."""
    cause = getattr(failure, "inner_exception", failure)
    lines = str(cause).strip().splitlines() or ["no message"]
    return f"{type(cause).__name__}: {lines[0]}"


def _backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, with `cllm_kernels.block_linear` for the linear layers that it is made for."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        given = _linear(node)
        if given is None or not _few(*given):
            continue
        x, weight, bias, across = given
        with graph.graph.inserting_before(node):
            if across:
                weight = graph.graph.call_method("t", (weight,))
            node.target = torch.ops.cllm_kernels.block_linear.default
            node.args, node.kwargs = (x, weight, bias, None, None, 0), {}
    graph.recompile()
    return _lowered(graph, inputs)


def _lowered(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, list(inputs))


def _linear(node: torch.fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """x, weight and bias of a linear layer, and whether the weight lies across, [in, out], as that
    of GPT-2's `Conv1D`; None: the node is something else."""
    if node.target is torch._C._nn.linear:
        names = ("input", "weight", "bias")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        return given["input"], given["weight"], given.get("bias"), False
    if node.target is torch.addmm and not node.kwargs:
        bias, x, weight = node.args
        return x, weight, bias, True
    return None


def _few(x: Any, weight: Any, bias: Any, across: bool) -> bool:
    """Whether `block_linear` is made for these, nodes of the graph."""
    rows, columns, added = _value(x), _value(weight), _value(bias)
    if not (isinstance(rows, torch.Tensor) and isinstance(columns, torch.Tensor)):
        return False
    if rows.dtype not in DTYPES or rows.dtype is not columns.dtype:
        return False
    if rows.dim() == 0 or columns.dim() != 2:
        return False
    out = columns.shape[1:] if across else columns.shape[:1]
    if bias is not None and getattr(added, "shape", None) != out:
        return False
    return rows.numel() <= most_rows(rows.dtype, across) * rows.shape[-1]


def _value(node: Any) -> Any:
    """What stands for a node's tensor while it is traced."""
    return getattr(node, "meta", {}).get("example_value")
