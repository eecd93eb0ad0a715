"""HuggingFace attention implementation ``"cllm"``: SDPA for a block of queries under a mask.

With a mask and more than one query, transformers repeats every key and value head for its group of
query heads, a copy of the whole cache per layer and forward. Here the group is folded into the
query rows instead: ``[B, Hkv, G * n, D]`` queries attend to ``[B, Hkv, K, D]`` keys as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cllm"
_lock = threading.Lock()
_users: dict[int, int] = {}  # id of a config -> calls that decode with it right now


def cllm_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of n queries to K keys, with grouped query heads folded into the queries.

    Args:
        query: [B, Hq, n, D].
        key, value: [B, Hkv, K, D], Hq a multiple of Hkv; strided views are read in place.
        attention_mask: [B or 1, 1, n, K], boolean (True: attend) or additive, or None.

    Returns:
        [B, n, Hq, D] and None. Whatever has no group to fold goes to transformers' own SDPA.
    """
    batch, heads, width, size = query.shape
    groups = heads // key.shape[1]
    if (
        attention_mask is None
        or groups == 1
        or width == 1
        or attention_mask.shape[1] != 1
        or dropout != 0.0
        or kwargs.get("position_bias") is not None
        or kwargs.get("softcap") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(batch, key.shape[1], groups * width, size)
    mask = _folded_mask(attention_mask, groups, query.dtype)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scaling
    )
    output = output.reshape(batch, heads, width, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def _folded_mask(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, n, K] -> additive [B, 1, G * n, K], kept on the mask: all layers share one forward's
    mask, and folding it anew in each would cost as much as the copies it saves."""
    kept = getattr(mask, "_cllm_folded", None)
    if kept is not None and kept[0] == (groups, dtype):
        return kept[1]
    additive = mask
    if mask.dtype == torch.bool:
        additive = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    folded = additive.repeat(1, 1, groups, 1)
    mask._cllm_folded = ((groups, dtype), folded)  # type: ignore[attr-defined]
    return folded


AttentionInterface.register(NAME, cllm_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def folded_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let every part of `model` that uses SDPA use `cllm_attention_forward`, for a while.

    The implementation's name in the configs is all that changes, and it is put back by the last
    concurrent call to leave.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) in ("sdpa", NAME):
            configs[id(config)] = config
    with _lock:
        taken = [
            config
            for key, config in configs.items()
            if key in _users or config._attn_implementation == "sdpa"
        ]
        for config in taken:
            _users[id(config)] = _users.get(id(config), 0) + 1
            config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        with _lock:
            for config in taken:
                _users[id(config)] -= 1
                if not _users[id(config)]:
                    del _users[id(config)]
                    config._attn_implementation_internal = "sdpa"
