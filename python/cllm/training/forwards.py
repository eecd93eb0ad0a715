"""The decoder's forward over a packed batch: in one part, or the clean columns before the noisy
ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..head import LanguageHead
from .gate import AdapterGate
from .masks import PackedTokens, attention_masks
from .packing import TOKEN_FIELDS
from .teachers import adapter_off


def packed_hidden_states(
    head: LanguageHead,
    kinds: dict[str, int | None],
    batch: dict[str, Any],
    columns: int | None = None,
    *,
    first: int = 0,
    cache: Any = None,
) -> Tensor:
    """[B, S, H] of packed rows, or of the columns from `first` on, before `columns`.

    Args:
        cache: KV cache, which holds the columns before `first`.
    """
    fields = {name: batch[name][:, :columns] for name in TOKEN_FIELDS}
    tokens = PackedTokens(**{name: fields[name] for name in TOKEN_FIELDS if name != "input_ids"})
    model = head.model
    implementation = model.config.get_text_config()._attn_implementation
    return head.hidden_states(
        cache,
        input_ids=fields["input_ids"][:, first:],
        position_ids=fields["position_ids"][:, first:],
        attention_mask=attention_masks(tokens, kinds, implementation, model.dtype, first),
    )


def gated_hidden_states(
    head: LanguageHead, kinds: dict[str, int | None], batch: dict[str, Any], gate: AdapterGate
) -> Tensor:
    """[B, S, H] of packed rows whose noisy columns alone have the adapters.

    Clean columns see no noisy ones and nothing of them is trained, so they go first, without
    gradient, into a cache for the noisy ones: half of their cost, and no activations of theirs are
    kept. With gradient checkpointing, under which transformers' layers take no cache, and where a
    batch or a model does not allow it (`AdapterGate.two_parts`), all columns go in one part.
    """
    first = clean_columns(batch) if gate.two_parts and not _checkpointed(head.model) else 0
    if not first:
        return gate.hidden_states(
            batch["segment_ids"] > 0, lambda: packed_hidden_states(head, kinds, batch)
        )
    return two_part_hidden_states(head, kinds, batch, gate, first)


def two_part_hidden_states(
    head: LanguageHead,
    kinds: dict[str, int | None],
    batch: dict[str, Any],
    gate: AdapterGate,
    first: int,
) -> Tensor:
    """The same, columns before `first` by the base model and then the others with the adapters."""

    def read(cache: DynamicCache) -> Tensor:
        with torch.no_grad(), adapter_off(head):
            return packed_hidden_states(head, kinds, batch, first, cache=cache)

    if gate.texts is None:
        cache = DynamicCache()
        clean = read(cache)
    else:
        clean, cache = gate.texts.read(batch, first, head.model, read)
    with gate.opened():
        noisy = packed_hidden_states(head, kinds, batch, first=first, cache=cache)
    return torch.cat([clean.to(noisy.dtype), noisy], dim=1)


def clean_columns(batch: dict[str, Any]) -> int:
    """Columns of a batch before its first noisy one; 0 if clean ones stand behind it."""
    noisy = (batch["segment_ids"] > 0).any(dim=0)
    first = int(noisy.int().argmax())
    behind = (batch["segment_ids"][:, first:] == 0) & (batch["sample_ids"][:, first:] >= 0)
    return 0 if bool(behind.any()) else first


def _checkpointed(model: Any) -> bool:
    return any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )
