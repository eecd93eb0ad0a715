"""Whole decoder layers through `cllm_kernels.decoder_layer`, where a model has such layers.

A forward of few rows spends half of its time between its matrix products: in small operations,
each of them too short to be worth its call. A layer of the Llama kind is one native call on a CPU
here, and on a GPU seven launches instead of some forty. The model's own forward stays around it:
embedding, rotary table, final norm, head, and every hook on the model; only `forward` of its
decoder layers, and on a GPU that of its final norm, is another one meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import cllm_kernels
from cllm_kernels import DecoderWeights, current_backend
from cllm_kernels.decoder_layer import OP
from cllm_kernels.decoder_layer.weights import LINEARS

from ..linears import MOST_ROWS, active_terms, fusable
from . import final_norm
from .cache import RaggedCache
from .masks import CHUNKED
from .stack import LayerStack, check_rows
from .support import ModelTraits

# transformers' families whose decoder layer is that of `decoder_layer`, by the modules' own names:
# a subclass may do anything, and what a family does otherwise (Gemma's norms, Phi's fused
# projections) is left to its own forward.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_ACTIVATIONS = ("SiLU", "SiLUActivation")
_LINEARS = (
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)
# those of them that read the same input
_SHARED = ((0, 1, 2), (4, 5))
# Sets of weights that a layer keeps: one for each adapter that works right now, and without any.
_MOST_WEIGHTS = 8

_lock = threading.Lock()
# layers and final norms whose forward is replaced right now -> by how many calls
_users: dict[torch.nn.Module, int] = {}


def decoder_layers(model: Any, traits: ModelTraits, rows: int) -> list[torch.nn.Module] | None:
    """The decoder layers of `model`, if a kernel of `decoder_layer` can stand for all of them.

    Args:
        rows: of a forward, batch times window; on a CPU more than `MOST_ROWS` are torch's matter.
    """
    device = model.device
    if model.training or (device.type == "cpu" and rows > MOST_ROWS):
        return None
    if OP.choose(device, current_backend()) == "reference":
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    if CHUNKED in traits.mask_kinds or traits.additive_masks:
        return None
    family = type(model).__name__.removesuffix("ForCausalLM")
    inner = getattr(model, "model", None)
    if family not in _FAMILIES or not _is(model, family, "ForCausalLM"):
        return None
    if not _is(inner, family, "Model"):
        return None
    found = list(inner.layers)  # type: ignore[union-attr]
    return found if all(_known(layer, family) for layer in found) else None


def _is(module: Any, family: str, kind: str) -> bool:
    """Whether `module` is of transformers' own class of this name."""
    package = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    return (type(module).__module__, type(module).__name__) == (package, family + kind)


def _known(layer: Any, family: str) -> bool:
    """Whether `layer` is made of the very modules that `decoder_layer` computes, none of them with
    a hook or somebody else's forward."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = ("input_layernorm", "post_attention_layernorm")
    norms: list[Any] = [getattr(layer, name, None) for name in names]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None))]
    expected = [(layer, "DecoderLayer"), (attention, "Attention"), (mlp, "MLP")]
    expected += [(norm, "RMSNorm") for norm in norms]
    if not all(_is(module, family, kind) for module, kind in expected):
        return False
    linears = [getattr(getattr(layer, part), name, None) for part, name in _LINEARS]
    if not all(linear is not None and fusable(linear) for linear in linears):
        return False
    if len({linear.weight.device for linear in linears if linear is not None}) > 1:
        return False
    assert attention is not None and mlp is not None
    activation = getattr(mlp, "act_fn", None)
    if type(activation).__name__ not in _ACTIVATIONS:
        return False
    if len({norm.variance_epsilon for norm in norms}) > 1:
        return False
    if not (2 <= attention.head_dim <= 256 and attention.head_dim % 2 == 0):
        return False
    return all(untouched(module) for module in layer.modules())


def untouched(module: Any) -> bool:
    """Whether nobody but us has hooked a module, or given it a forward of its own."""
    own = "forward" not in module.__dict__ or module in _users or fusable(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return own and not any(getattr(module, name) for name in hooks)


def replaced(module: torch.nn.Module) -> bool:
    """Whether the forward of `module` is that of a native layer or norm right now."""
    return module in _users


def _norms(model: Any) -> list[Any]:
    """The final norm of `model`, one of `decoder_layers`, if a kernel of `rms_norm` can stand for
    it; else nothing."""
    norm: Any = getattr(model.model, "norm", None)
    family = type(model).__name__.removesuffix("ForCausalLM")
    if not _is(norm, family, "RMSNorm"):
        return []
    plain = type(norm.weight) is torch.nn.Parameter
    return [norm] if plain and untouched(norm) else []


@contextmanager
def native_layers(model: Any, traits: ModelTraits) -> Iterator[None]:
    """Let the decoder layers of `model` run as `decoder_layer` over the windows of a `RaggedCache`,
    for a while; on a CPU the first of them runs all, and the others hand on what it gave. Forwards
    without such a cache go through the layers' own forward. The final norm runs as `rms_norm`, in
    every forward.

    The last concurrent call to leave puts the modules' own forward back.
    """
    layers = list(model.model.layers)
    with _lock:
        norms = _norms(model)
        for layer in layers:
            native = getattr(layer.forward, "__self__", None)
            if isinstance(native, NativeLayer):
                native.leave_unless(layers)
        made = [
            NativeLayer(layer, index, _window(model, index, traits))
            for index, layer in enumerate(layers)
            if layer not in _users
        ]
        if len(made) == len(layers) and _stackable(model, made):
            made[0].others = tuple(made[1:])
        new = [norm for norm in norms if norm not in _users]
        # other threads know a forward as ours by this, and look without the lock
        for module in (*layers, *norms):
            _users[module] = _users.get(module, 0) + 1
        for native in made:
            native.layer.forward = native.forward
        for norm in new:
            norm.forward = final_norm.NativeNorm(norm).forward
    try:
        yield
    finally:
        with _lock:
            for module in (*layers, *norms):
                if _users[module] == 1:
                    del module.forward
                    del _users[module]
                else:
                    _users[module] -= 1


def _stackable(model: Any, natives: list[NativeLayer]) -> bool:
    """Whether the model's forward is a walk through all of its layers, which differ in nothing that
    `DecoderStack` asks to be equal."""
    first = natives[0]
    same = all(native.alike == first.alike for native in natives)
    walks = "forward" not in model.model.__dict__
    return first.on_cpu and same and walks and model.config.num_hidden_layers == len(natives)


def _window(model: Any, index: int, traits: ModelTraits) -> int | None:
    """Positions that a query of the layer sees, or None: all before it."""
    if len(traits.mask_kinds) == 1:
        return next(iter(traits.mask_kinds.values()))
    return traits.mask_kinds[model.config.layer_types[index]]


class NativeLayer:
    """A decoder layer, the tensors it is made of, and the forward that takes its place."""

    def __init__(self, layer: Any, index: int, window: int | None):
        self.own: Callable[..., Any] = layer.forward
        self.layer = layer
        self.index = index
        self.window = window
        self.linears = [getattr(getattr(layer, part), name) for part, name in _LINEARS]
        self.eps = layer.input_layernorm.variance_epsilon
        self.scale = layer.self_attn.scaling
        # of a first layer that runs all: those behind it
        self.others: tuple[NativeLayer, ...] = ()
        # by the terms that the weights hold; None: no term at all
        self._weights: dict[Any, DecoderWeights] = {}

    @property
    def on_cpu(self) -> bool:
        return self.linears[0].weight.is_cpu

    @property
    def alike(self) -> tuple[Any, ...]:
        weights = [linear.weight for linear in self.linears]
        shapes = tuple(tuple(weight.shape) for weight in weights)
        return self.eps, self.scale, weights[0].dtype, weights[0].device, shapes

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, n, H] -> the same, as the layer's own forward."""
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        if not isinstance(cache, RaggedCache) or cache.plan.prefill or not cache.plan.native:
            return self.own(hidden_states, *args, **kwargs)
        plan = cache.plan
        assert plan.lengths is not None
        cos, sin = kwargs["position_embeddings"]
        if self.index == 0:
            stack = self.stack(cache)
            if stack is not None:
                return stack(hidden_states, cos, sin, cache)
        elif cache.stack is not None and self in cache.stack:
            if cache.stack.latest is hidden_states:
                if self is cache.stack.last:
                    cache.stack.latest = None
                return hidden_states
            raise RuntimeError(
                f"decoder layer {self.index} was not given what the layers before it gave, but "
                "something made of it; whatever changes it has to be on the model before cllm's "
                "first call with it"
            )
        weights, gated_from = self.with_terms(hidden_states.shape[:2])
        keys, values = self.caches(cache, hidden_states)
        return cllm_kernels.decoder_layer(
            hidden_states,
            weights,
            cos,
            sin,
            keys,
            values,
            plan.lengths,
            eps=self.eps,
            scale=self.scale,
            window=self.window,
            guesses_from=plan.guesses_from,
            guess_width=plan.guess_width,
            gated_from=gated_from,
        )

    def leave_unless(self, layers: list[torch.nn.Module]) -> None:
        """Run this layer alone from now on, unless these are the layers that it runs: another model
        has come that shares some of them."""
        if [self.layer, *(native.layer for native in self.others)] != layers:
            self.others = ()

    def stack(self, cache: RaggedCache) -> LayerStack | None:
        """What runs all layers over this cache, if this layer is to do so; the cache keeps it."""
        stack: LayerStack | None = cache.stack
        if not self.others:
            stack = None
        elif stack is None or stack.first is not self or stack.outdated():
            stack = LayerStack((self, *self.others), cache.plan)
        cache.stack = stack
        return stack

    def caches(self, cache: RaggedCache, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values [B, Hkv, C, D], with room for the coming window."""
        size = self.layer.self_attn.head_dim
        heads = self.linears[1].weight.shape[0] // size
        return cache.layer(self.index).for_window(heads, size, like)

    def with_terms(self, shape: torch.Size) -> tuple[DecoderWeights, int | None]:
        """The weights with the low-rank terms of this thread's forward over `shape` tokens, and the
        first row that gets those."""
        terms, rows = active_terms(self.linears)
        check_rows(rows, shape)
        weights = self._weights.get(terms)
        if weights is None:
            if len(self._weights) == _MOST_WEIGHTS:  # every call with an adapter brings its own
                del self._weights[next(iter(self._weights))]
            weights = self._weights[terms] = self._made(terms)
        return weights, None if rows is None else rows[0]

    def _made(self, terms: tuple[Any, ...]) -> DecoderWeights:
        layer, attention = self.layer, self.layer.self_attn

        def norm(module: Any) -> torch.Tensor | None:
            return None if module is None else module.weight.detach()

        if not self.on_cpu:
            for group in _SHARED:
                there = [terms[index] for index in group if terms[index] is not None]
                if len(there) > 1:
                    there[0].lay_above(there[1:])
        weights: dict[str, Any] = {
            name: linear.weight.detach() for name, linear in zip(LINEARS, self.linears, strict=True)
        }
        return DecoderWeights(
            **weights,
            attention_norm=layer.input_layernorm.weight.detach(),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            head_size=attention.head_dim,
            query_norm=norm(getattr(attention, "q_norm", None)),
            key_norm=norm(getattr(attention, "k_norm", None)),
            biases=[
                None if linear.bias is None else linear.bias.detach() for linear in self.linears
            ],
            low_rank=[None if term is None else term.low_rank for term in terms],
        )
