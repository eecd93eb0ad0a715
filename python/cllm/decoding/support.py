"""Which models can be decoded, and what their forward needs: found out from the model, not from a
list of class names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..traits import RopeChange, UnsupportedModelError, cache_argument, mask_kinds, rope_changes
from .attention import chosen_implementation


class UnsupportedOptionError(ValueError):
    """An option of `generate` that Jacobi decoding does not carry out.

    Attributes:
        option: the option as the user wrote it, ``"num_beams=4"`` say.
    """

    def __init__(self, option: str, reason: str):
        super().__init__(f"Jacobi decoding cannot carry out {option}: {reason}")
        self.option = option


@dataclass(frozen=True)
class ModelTraits:
    """What the decoding loop must know of a model.

    Attributes:
        mask_kinds: layer type to window or chunk size (None for full attention).
        mask_dict: the model takes one mask per layer type.
        additive_masks: masks must be floating point (eager attention), not boolean.
        cache_argument: what the forward calls its KV cache.
        takes_positions: the forward has `position_ids`.
        takes_logits_to_keep: the forward can skip the logits of the prefill.
        context: positions the model was made for, or None where its config names none.
        bounded_positions: positions beyond `context` do not exist (learned embeddings, or a table).
        vocab_size: rows of the input embedding.
        prefer_right_aligned: keys carry their position by their place (ALiBi), so rows must end
            in the same slot.
        rope_changes: lengths at which the model's frequencies change.
    """

    mask_kinds: dict[str, int | None]
    mask_dict: bool
    additive_masks: bool
    cache_argument: str
    takes_positions: bool
    takes_logits_to_keep: bool
    context: int | None
    bounded_positions: bool
    vocab_size: int
    prefer_right_aligned: bool
    rope_changes: tuple[RopeChange, ...]


_ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "cllm")


def check_model(model: Any) -> ModelTraits:
    """What `model` needs to be decoded.

    Raises:
        UnsupportedModelError: if it is no causal language model with a plain attention cache.
    """
    if "_orig_mod" in getattr(model, "_modules", {}):
        # its generate is that of the model inside, which knows nothing of the wrapper
        inner = type(model._orig_mod).__name__
        raise UnsupportedModelError(
            f"torch.compile has wrapped this {inner}; pass the model itself, which is its _orig_mod"
        )
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{name} is not a transformers model that can generate; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; Jacobi decoding needs a decoder-only model"
        )
    text = config.get_text_config()
    _check_rewindable(model, name, text)
    _check_not_prompt_tuned(model)
    parameters = _forward_parameters(model)
    cache = cache_argument(parameters)
    if cache is None:
        raise UnsupportedModelError(
            f"the forward of {name} takes no past_key_values; Jacobi decoding needs a KV cache"
        )
    implementation = chosen_implementation(text) or "eager"
    if implementation not in _ATTENTION_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} uses attn_implementation={implementation!r}, which takes no mask per row; "
            "call model.set_attn_implementation('sdpa') first"
        )
    kinds = mask_kinds(name, text)
    context = getattr(text, "max_position_embeddings", None)
    takes_positions = "position_ids" in parameters
    return ModelTraits(
        mask_kinds=kinds,
        mask_dict=len(kinds) > 1,
        additive_masks=implementation == "eager",
        cache_argument=cache,
        takes_positions=takes_positions,
        takes_logits_to_keep="logits_to_keep" in parameters,
        context=context,
        bounded_positions=context is not None and _bounded_positions(model, text),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        prefer_right_aligned=(
            not takes_positions or bool(getattr(text, "alibi", False)) or _local_by_place(text)
        ),
        rope_changes=rope_changes(text),
    )


def _local_by_place(text: Any) -> bool:
    """Whether layers tell what is too far away by the keys' places, not by masks (GPT-Neo): a short
    probe would not find that out."""
    return "local" in (getattr(text, "attention_layers", None) or ())


def _bounded_positions(model: Any, text: Any) -> bool:
    """Whether positions come from a table that ends with the model's context."""
    unbounded = ("rope_parameters", "rope_theta", "rotary_pct", "rotary_emb_base")
    if any(getattr(text, key, None) is not None for key in unbounded):
        return False
    # a table of RoPE's angles, as GPT-J has it
    if any(torch.is_tensor(getattr(module, "embed_positions", None)) for module in model.modules()):
        return True
    if getattr(text, "rotary_dim", None) is not None or getattr(text, "alibi", False):
        return False
    # a table of sines, as XGLM has it, is made anew where a text outgrows it
    return not any(hasattr(module, "make_weights") for module in model.modules())


def _forward_parameters(model: Any) -> set[str]:
    parameters = set(inspect.signature(model.forward).parameters)
    if cache_argument(parameters) is None:
        # a wrapper (PEFT, a hook) forwards *args and **kwargs: ask what it wraps
        base = getattr(model, "get_base_model", None)
        if callable(base):
            parameters |= set(inspect.signature(base().forward).parameters)
    return parameters


def _check_rewindable(model: Any, name: str, text: Any) -> None:
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state, which cannot be rewound to drop wrong guesses; "
            "Jacobi decoding needs a model whose cache is plain attention"
        )
    types = set(getattr(text, "layer_types", None) or ())
    types |= set(getattr(text, "layers_block_type", None) or ())
    types |= set(getattr(text, "block_types", None) or ())
    recurrent = sorted(kind for kind in types if "mamba" in kind or "recurrent" in kind)
    recurrent += sorted(types & {"linear_attention", "conv", "hybrid", "hybrid_sliding"})
    if recurrent:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(recurrent)}, whose state cannot be rewound to "
            "drop wrong guesses; Jacobi decoding needs a model whose cache is plain attention"
        )


def _check_not_prompt_tuned(model: Any) -> None:
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    for owner in (model, getattr(prepare, "__self__", None)):
        peft = getattr(owner, "active_peft_config", None)
        if peft is not None and getattr(peft, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"the active PEFT adapter ({peft.peft_type}) prepends learned virtual tokens, "
                "which Jacobi decoding does not feed; merge it or use a LoRA-like adapter"
            )


def model_device(model: Any) -> torch.device:
    """The device of the input embedding, where prompts must be."""
    return model.get_input_embeddings().weight.device
