"""HuggingFace attention implementation ``"cllm"``, for any model and for our own block forward.

Under a mask it is SDPA. With more than one query, transformers repeats every key and value head for
its group of query heads, a copy of the whole cache per layer and forward. Here the group is folded
into the query rows instead: ``[B, Hkv, G * n, D]`` queries attend to ``[B, Hkv, K, D]`` keys as
they are. Soft-capped scores (Gemma 2), which SDPA does not know, are computed here.

In a block forward over the ragged cache the mask says no more than that: the layer's own keys and
its storage go to `cllm_kernels.block_attention`.
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

import cllm_kernels

from .masks import RaggedBlock

NAME = "cllm"
_lock = threading.Lock()
# id of a config -> (calls that decode with it right now, the implementation its owner chose)
_users: dict[int, tuple[int, str]] = {}


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
        attention_mask: [B or 1, 1, n, K], boolean (True: attend) or additive; None; or that of
            `masks.block_mask`: key and value are then the block's own, K = n, and what the plan's
            cache layer holds comes before them.

    Returns:
        [B, n, Hq, D] and None. Whatever has no group to fold goes to transformers' own SDPA.

    Raises:
        ValueError: attention sinks, which would be left out.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            "attn_implementation='cllm' has no attention sinks; choose 'eager' for this model"
        )
    block = getattr(attention_mask, "_cllm_block", None)
    if block is not None:
        return _block_attention(block, query, key, value, dropout, scaling, kwargs), None
    softcap = kwargs.get("softcap")
    batch, heads, width, size = query.shape
    groups = heads // key.shape[1]
    if softcap is None and (
        attention_mask is None
        or groups == 1
        or width == 1
        or attention_mask.shape[1] != 1
        or dropout != 0.0
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(batch, key.shape[1], groups * width, size)
    if softcap is not None:
        scale = size**-0.5 if scaling is None else scaling
        mask = _full_mask(module, query, key, attention_mask, kwargs)
        weights = _softcapped_weights(folded, key, mask, scale, softcap, groups)
        output = torch.nn.functional.dropout(weights, dropout, module.training) @ value
    else:
        assert attention_mask is not None
        mask = _folded_mask(attention_mask, groups, query.dtype)
        output = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=scaling
        )
    output = output.reshape(batch, heads, width, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def _block_attention(
    block: RaggedBlock,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """[B, n, Hq, D] from the block and the storage of the layer that it was handed to."""
    if dropout != 0.0 or kwargs.get("position_bias") is not None:
        raise ValueError("block attention has neither dropout nor a position bias")
    plan = block.plan
    keys, values = plan.take(key, value)
    output = cllm_kernels.block_attention(
        query,
        key,
        value,
        keys,
        values,
        plan.lengths,
        scale=scaling,
        window=block.window,
        softcap=kwargs.get("softcap"),
        max_length=plan.longest_view,
    )
    return output.transpose(1, 2)


def _full_mask(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The mask that SDPA would have made of None: causal, unless the layer says otherwise."""
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    width = query.shape[2]
    if mask is not None or not causal or width == 1:
        return mask
    columns = torch.arange(key.shape[2], device=query.device)
    return (columns <= torch.arange(width, device=query.device)[:, None])[None, None]


def _softcapped_weights(
    folded: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    groups: int,
) -> torch.Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) [B, Hkv, G * n, K] for `folded`
    [B, Hkv, G * n, D], capped and summed in fp32."""
    scores = (folded @ key.transpose(2, 3)).float() * (scale / softcap)
    scores = softcap * torch.tanh(scores)
    if mask is not None:
        scores = scores.unflatten(2, (groups, -1))
        spread = mask.unsqueeze(2)  # [B or 1, 1, 1, n, K]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~spread, torch.finfo(scores.dtype).min)
        else:
            scores = scores + spread
        scores = scores.flatten(2, 3)
    return scores.softmax(dim=-1).to(folded.dtype)


def _folded_mask(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, n, K] -> additive [B, 1, G * n, K], kept on the mask: all layers share one forward's
    mask, and folding it anew in each would cost as much as the copies it saves."""
    kept = getattr(mask, "_cllm_folded", None)
    if kept is not None and kept[0] == (groups, dtype):
        return kept[1]
    additive = mask
    if mask.dtype == torch.bool:
        # finfo.min keeps a row that sees nothing from NaN; where keys may be garbage (no row of
        # `masks.chains_mask` sees nothing) only -inf keeps their scores from counting
        exact = getattr(mask, "_cllm_exact", False)
        blocked = float("-inf") if exact else torch.finfo(dtype).min
        additive = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, blocked)
    folded = additive.repeat(1, 1, groups, 1)
    mask._cllm_folded = ((groups, dtype), folded)  # type: ignore[attr-defined]
    return folded


def cllm_mask(**given: Any) -> torch.Tensor | None:
    """transformers' mask for SDPA, the same in a captured forward as in any other: up to 5.17 the
    causal mask of a prompt is left to the kernel unless a stream is being captured, and what reads
    the mask rounds otherwise."""
    length, local = given["kv_length"], given.get("local_size")
    causal = given.get("allow_is_causal_skip", True) and given.get("attention_mask") is None
    left_out = causal and given["q_length"] == length and (local is None or length < local)
    return None if left_out and _capturing() else sdpa_mask(**given)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


AttentionInterface.register(NAME, cllm_attention_forward)
AttentionMaskInterface.register(NAME, cllm_mask)


def chosen_implementation(config: Any) -> str | None:
    """The attention that the owner of `config` chose, even while a call has it replaced."""
    used = _users.get(id(config))
    return used[1] if used else getattr(config, "_attn_implementation", None)


@contextmanager
def cllm_attention(model: torch.nn.Module, replaced: tuple[str, ...]) -> Iterator[None]:
    """Let every part of `model` whose attention is one of `replaced` use
    `cllm_attention_forward`, for a while.

    The implementation's name in the configs is all that changes, and it is put back by the last
    concurrent call to leave.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and chosen_implementation(config) in replaced:
            configs[id(config)] = config
    with _lock:
        for key, config in configs.items():
            users, chosen = _users.get(key, (0, config._attn_implementation))
            _users[key] = users + 1, chosen
            config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        with _lock:
            for key, config in configs.items():
                users, chosen = _users[key]
                if users > 1:
                    _users[key] = users - 1, chosen
                else:
                    # in this order, as others look without the lock
                    config._attn_implementation_internal = chosen
                    del _users[key]
