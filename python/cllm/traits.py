"""What decoding and training both must know of a model: what it is wrapped in, which keys its
layers may attend to. Found out from the model, not from a list of class names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_ATTENTION_TYPES = (FULL, SLIDING, CHUNKED)
CACHE_ARGUMENTS = ("past_key_values", "cache")


class UnsupportedModelError(ValueError):
    """The model cannot be decoded, or trained, this way; the message says why."""


def cache_argument(parameters: Collection[str]) -> str | None:
    """What a forward with these parameters calls its KV cache; None if it takes none.

    transformers renamed it in 5.24: its own models then say ``cache``, others what they always did.
    """
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def unwrapped(model: Any) -> Any:
    """The transformers model inside of PEFT, DistributedDataParallel and `torch.compile`.

    Raises:
        UnsupportedModelError: if the active adapter prepends virtual tokens, which a forward past
            the wrapper would leave out.
    """
    while True:
        peft = getattr(model, "active_peft_config", None)
        if peft is not None and getattr(peft, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"the active PEFT adapter ({peft.peft_type}) prepends learned virtual tokens, "
                "which are not fed here; use a LoRA-like adapter"
            )
        children = getattr(model, "_modules", {})
        if callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        elif "_orig_mod" in children:
            model = children["_orig_mod"]
        elif set(children) == {"module"}:
            model = children["module"]
        else:
            return model


def mask_kinds(name: str, text: Any) -> dict[str, int | None]:
    """The kinds of attention among a model's layers, with the window or chunk of each.

    Args:
        name: of the model, for messages.
        text: its text config.

    Returns:
        Layer type to size in tokens, None for full attention.

    Raises:
        UnsupportedModelError: for a kind that is not known, or has no size.
    """
    window = getattr(text, "sliding_window", None)
    chunk = getattr(text, "attention_chunk_size", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        types = [SLIDING if window is not None else CHUNKED if chunk is not None else FULL]
    # Mixture and MLP layers appear among the layer types of some models; they need no mask
    used = {kind for kind in types if kind not in ("moe", "mlp", "sparse", "dense")}
    unknown = used - set(_ATTENTION_TYPES)
    if unknown:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(sorted(unknown))}; known are "
            f"{', '.join(_ATTENTION_TYPES)}"
        )
    sizes = {FULL: None, SLIDING: window, CHUNKED: chunk}
    for kind in used:
        if kind != FULL and sizes[kind] is None:
            raise UnsupportedModelError(
                f"{name} has layers of type {kind}, but its config gives no size for them"
            )
    return {kind: sizes[kind] for kind in _ATTENTION_TYPES if kind in used}


# by how much a cache of fixed size may be longer than its text
_ROUNDED = 1024


@dataclass(frozen=True)
class RopeChange:
    """A length at which the frequencies of RoPE change, and with them all keys and queries.

    Attributes:
        rope_type: as the config names it; "attn_temperature_tuning": it is the queries' scale.
        threshold: most tokens of a forward's texts with the frequencies of short ones.
        once: frequencies stay the same beyond it, instead of changing with every token.
    """

    rope_type: str
    threshold: int
    once: bool


def rope_changes(text: Any) -> tuple[RopeChange, ...]:
    """Where the frequencies of a model with this text config depend on the length; no two are
    alike. Models differ in it by kind of layer, too."""
    found: dict[RopeChange, None] = {}
    # models from outside of transformers still say rope_scaling
    names = ("rope_parameters", "rope_scaling")
    given = (getattr(text, name, None) for name in names)
    parameters: dict[str, Any] = next((value for value in given if value), {})
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    context = getattr(text, "max_position_embeddings", None)
    for one in nested or [parameters]:
        kind = one.get("rope_type") or one.get("type") or ""
        once = kind in ("longrope", "su")
        threshold = context
        if once:
            name = "original_max_position_embeddings"
            threshold = one.get(name) or getattr(text, name, None) or context
        if threshold is not None and (once or "dynamic" in kind):
            found[RopeChange(kind, int(threshold), once)] = None
    # Llama 4 counts the tokens of its cache there, which rows of different length do not share
    floor = getattr(text, "floor_scale", None)
    if getattr(text, "attn_temperature_tuning", False) and floor:
        found[RopeChange("attn_temperature_tuning", max(1, int(floor) - _ROUNDED), False)] = None
    return tuple(found)
