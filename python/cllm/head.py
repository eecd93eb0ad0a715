"""A causal language model taken apart: the decoder that makes hidden states, and the head that
makes logits of them. So a loss or an argmax can have logits for some rows only, and never all."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cllm_kernels

from .traits import UnsupportedModelError, cache_argument, unwrapped
from .uncompiled import uncompiled

# Relative error (2-norm over the vocabulary) that rounding explains, by dtype: the hidden states
# are the same, so no more than the head's own matmul, scale and cap can differ.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# What models multiply or divide their logits by; which of the two, their forward tells.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_scale")

# by dtype, with the module whose weight it was: another may have taken its place since
_known: weakref.WeakKeyDictionary[Any, dict[torch.dtype, tuple[weakref.ref[Any], LanguageHead]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class LanguageHead:
    """The head of one model: ``logits = softcap(scale * hidden @ weight.T + bias)``.

    Made by `LanguageHead.of`, which proves it against the model's own forward.

    Attributes:
        scale: of the logits (Cohere, Granite); folded into the hidden states by `scaled`.
        softcap: c of c * tanh(logits / c) (Gemma 2), or None.
    """

    _model: weakref.ref[Any]
    _decoder: str
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: Any) -> LanguageHead:
        """The head of `model`, found once and kept.

        Args:
            model: a causal language model of transformers; PEFT, DistributedDataParallel and
                `torch.compile` around it are looked through.

        Raises:
            UnsupportedModelError: if decoder and head do not give the logits of the model's own
                forward on a small random input (then every loss made with them would be wrong),
                or if the head is of a kind whose weight cannot be used by itself.
        """
        model = unwrapped(model)
        if not callable(getattr(model, "get_output_embeddings", None)):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a transformers model; load one with "
                "AutoModelForCausalLM.from_pretrained"
            )
        known, module = _known.setdefault(model, {}), _linear(model)
        found = known.get(model.dtype)
        if found is None or found[0]() is not module:
            found = known[model.dtype] = weakref.ref(module), _found(model)
        return found[1]

    def of_copy(self, model: Any) -> LanguageHead:
        """The head of a copy of this head's model."""
        return replace(self, _model=weakref.ref(model))

    @property
    def model(self) -> Any:
        """The transformers model that the head belongs to."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this head is gone")
        return model

    @property
    def decoder(self) -> Any:
        """The model without its head. Looked up anew, so that a compiled one is found."""
        return _decoder(self.model, self._decoder)

    @property
    def weight(self) -> Tensor:
        """[V, H], differentiable; whole where FSDP2 keeps it in shards."""
        return _whole(_linear(self.model).weight)

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        bias = getattr(_linear(self.model), "bias", None)
        return None if bias is None else _whole(bias)

    def hidden_states(self, cache: Any = None, **inputs: Any) -> Tensor:
        """The decoder's last hidden states.

        Args:
            cache: KV cache that is read and goes on growing; None: without one.
            inputs: of the decoder's forward: input_ids [B, S], attention_mask, position_ids, ...

        Returns:
            [B, S, H].
        """
        return _hidden_states(self.decoder, inputs, cache)

    def scaled(self, hidden: Tensor) -> Tensor:
        """`hidden`, of any shape, times the scale of the logits: what stands before `weight`."""
        return hidden if self.scale == 1 else hidden * self.scale

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scaled hidden states, weight and bias in one dtype: that of autocast where it is on, else
        that of `hidden`.

        Args:
            hidden: [R, H].

        Returns:
            ([R, H], [V, H], [V] or None), as `cllm_kernels` takes them.
        """
        dtype, kind = hidden.dtype, hidden.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        weight, bias = self.weight.to(dtype), self.bias
        return (
            self.scaled(hidden.to(dtype)),
            weight,
            None if bias is None else bias.to(dtype),
        )

    def argmax(
        self, hidden: Tensor, *, temperature: float | None = None, noise: Any = None
    ) -> Tensor:
        """The most likely token of each row, the lowest index among equals; with noise a sample.

        Args:
            hidden: [R, H] of `hidden_states`.
            temperature: divides the logits; None: 1.
            noise: (seed, row [R], position [R]) as `cllm_kernels.linear_argmax` takes it, or None.

        Returns:
            [R] int64.
        """
        if hidden.dtype == torch.float64 and noise is None:  # which the kernel does not take
            return self.logits(hidden).argmax(dim=-1)
        operand, weight, bias = self.operands(hidden)
        return cllm_kernels.linear_argmax(
            operand,
            weight,
            bias=bias,
            softcap=self.softcap,
            temperature=temperature,
            noise=noise,
        )[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., H], for few rows: proofs and tests."""
        operand, weight, bias = self.operands(hidden)
        logits = torch.nn.functional.linear(operand, weight, bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _found(model: Any) -> LanguageHead:
    """The first decoder, scale and cap that give the model's own logits."""
    name = type(model).__name__
    weight = _linear(model).weight
    text = model.config.get_text_config()
    generator = torch.Generator("cpu").manual_seed(0)
    device = model.get_input_embeddings().weight.device
    vocabulary = min(weight.shape[0], model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(vocabulary, (1, 8), generator=generator, device="cpu").to(device)
    bound = _BOUNDS.get(model.dtype, _BOUNDS[torch.bfloat16])
    best: tuple[float, LanguageHead] | None = None
    cap = getattr(text, "final_logit_softcapping", None)
    # a compiled model is not to be compiled for this one shape
    with torch.no_grad(), evaluating(model), uncompiled(model):
        expected = model(input_ids=tokens, use_cache=False).logits.double()
        for decoder in _decoders(model):
            hidden = _hidden_states(_decoder(model, decoder), {"input_ids": tokens})
            if hidden.shape[-1] != weight.shape[1]:
                continue
            for scale in _scales(text):
                for softcap in dict.fromkeys((cap, None)):
                    head = LanguageHead(weakref.ref(model), decoder, scale, softcap)
                    difference = head.logits(hidden).double() - expected
                    error = float(difference.norm() / expected.norm().clamp(min=1e-30))
                    if best is None or error < best[0]:
                        best = error, head
    if best is None or not best[0] <= bound:
        found = "no decoder with hidden states of its width" if best is None else f"{best[0]:.2g}"
        raise UnsupportedModelError(
            f"{name}: its logits are not those of its decoder and head: relative difference "
            f"{found}, rounding explains {bound:.2g}; it does something between the two that is "
            "not a scale or a soft-cap"
        )
    return best[1]


def _scales(text: Any) -> list[float]:
    scales = [1.0]
    for name in _SCALES:
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1 / float(value)]
    base = getattr(text, "dim_model_base", None)  # MiniCPM, by the width it was tuned at
    if base:
        scales.append(base / text.hidden_size)
    return list(dict.fromkeys(scales))


def _decoders(model: Any) -> list[str]:
    """Names under which the decoder may be found, `base_model` after `get_decoder` if it is
    another."""
    found = [
        name
        for name in ("get_decoder", "base_model")
        if getattr(model, name, None) is not None and _decoder(model, name) is not model
    ]
    if len(found) == 2 and _decoder(model, found[0]) is _decoder(model, found[1]):
        found.pop()
    return found


def _decoder(model: Any, name: str) -> Any:
    found = getattr(model, name)
    if name == "get_decoder":
        found = found()
        base = getattr(model, "base_model", None)
        if getattr(base, "_modules", {}).get("_orig_mod") is found:
            return base  # torch.compile(decoder): get_decoder sees through it
    return found


def _hidden_states(decoder: Any, inputs: dict[str, Any], cache: Any = None) -> Tensor:
    if cache is not None:
        name = cache_argument(inspect.signature(unwrapped(decoder).forward).parameters)
        inputs = {**inputs, name or "past_key_values": cache}
    output = decoder(**inputs, use_cache=cache is not None, return_dict=True)
    return output.last_hidden_state


def _linear(model: Any) -> Any:
    """The module whose weight makes the logits."""
    name = type(model).__name__
    module = model.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(f"{name} has no language-model head (get_output_embeddings)")
    if hasattr(module, "modules_to_save"):  # PEFT's copy that is trained beside the original
        adapters = getattr(module, "active_adapters", None) or [module.active_adapter]
        off = getattr(module, "disable_adapters", False)
        module = module.original_module if off else module.modules_to_save[adapters[0]]
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"the head of {name} is a PEFT layer ({type(module).__name__}), whose weight alone "
            "does not make the logits; leave it out of target_modules (modules_to_save works)"
        )
    weight = getattr(module, "weight", None)
    if weight is not None and hasattr(weight, "ds_id") and weight.numel() == 0:
        raise UnsupportedModelError(
            f"DeepSpeed ZeRO-3 keeps the head of {name} in pieces outside of the head's own "
            "forward; use ZeRO stage 1 or 2, or FSDP2"
        )
    if weight is None or weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise UnsupportedModelError(
            f"the head of {name} ({type(module).__name__}) has no floating-point weight [V, H]; "
            "keep it out of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    return module


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter put together; its gradient is averaged over the shards' owners, as FSDP
    does for the parameters it gathers itself."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mean = [Partial("avg")] * parameter.device_mesh.ndim
    return parameter.full_tensor(grad_placements=mean)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode (no dropout) for a while, then each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def takes(module: Any, argument: str) -> bool:
    """Whether the module's forward names `argument`."""
    return argument in inspect.signature(module.forward).parameters
