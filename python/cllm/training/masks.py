"""Which tokens of a packed row attend to which: as a mask for SDPA and eager attention, and as a
FlexAttention block mask. Both are one predicate over five small tensors of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..traits import CHUNKED, SLIDING, UnsupportedModelError

_DENSE = ("sdpa", "eager", "cllm")
FLEX = "flex_attention"


@dataclass(frozen=True)
class PackedTokens:
    """What a packed batch's masks are made of, each [B, S] int64.

    Attributes:
        sample_ids: -1 where padding.
        segment_ids: 0 where clean, else the number of the noisy segment in its row.
        position_ids: within the sample.
        visible: clean tokens of its sample that a token may attend to.
    """

    sample_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    visible: Tensor

    def allowed(self, query: Callable, key: Callable, kind: str, size: int | None) -> Any:
        """Whether queries may attend to keys.

        A token sees the clean tokens of its sample before `visible`, and its own noisy segment up
        to itself; a sliding layer the last `size` positions of them, a chunked one those of its
        chunk.

        Args:
            query, key: take one of the tensors to its values at the queries, or keys: by
                broadcasting for a dense mask, by indexing for FlexAttention.
        """
        segment, position = query(self.segment_ids), query(self.position_ids)
        key_segment, key_position = key(self.segment_ids), key(self.position_ids)
        sample = query(self.sample_ids)
        clean = (key_segment == 0) & (key_position < query(self.visible))
        # padding has segment 0 and visible 0, and sees nothing
        own = (segment == key_segment) & (segment != 0) & (key_position <= position)
        seen = (sample == key(self.sample_ids)) & (clean | own)
        if kind == SLIDING and size is not None:
            seen = seen & (position - key_position < size)
        elif kind == CHUNKED and size is not None:
            seen = seen & (position // size == key_position // size)
        return seen


def dense_mask(
    tokens: PackedTokens,
    kind: str,
    size: int | None,
    dtype: torch.dtype | None = None,
    first: int = 0,
) -> Tensor:
    """The mask of one kind of layer.

    Args:
        kind, size: a layer type of `traits.mask_kinds` and its window or chunk.
        dtype: None for a boolean mask (True: attend), else an additive one of this dtype.
        first: the queries are the columns from here on.

    Returns:
        [B, 1, S - first, S]. Padding attends to itself, so that no softmax is over nothing.
    """
    allowed = tokens.allowed(lambda x: x[:, first:, None], lambda x: x[:, None, :], kind, size)
    columns = torch.arange(allowed.shape[-1], device=allowed.device)
    allowed |= columns[first:, None] == columns
    allowed = allowed[:, None]
    if dtype is None:
        return allowed
    additive = torch.zeros_like(allowed, dtype=dtype)
    return additive.masked_fill_(~allowed, torch.finfo(dtype).min)


def flex_mask(tokens: PackedTokens, kind: str, size: int | None, first: int = 0) -> Any:
    """The same as a FlexAttention `BlockMask`, which lists the blocks of 128 x 128 that hold
    anything, so that attention skips the rest.

    The mask depends on what the batch holds and is made anew for each. What is kept is the compiled
    maker, one for each shape: padding S to few lengths keeps it warm.
    """

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        column = query + first
        seen = tokens.allowed(lambda x: x[batch, column], lambda x: x[batch, key], kind, size)
        return seen | (column == key)

    rows, columns = tokens.sample_ids.shape
    return _block_mask_maker(tokens.sample_ids.is_cuda)(
        allowed, rows, None, columns - first, columns, device=tokens.sample_ids.device
    )


@cache
def _block_mask_maker(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    # uncompiled, it holds the whole mask [B, S, S] for a moment
    return torch.compile(create_block_mask) if compiled else create_block_mask


def attention_masks(
    tokens: PackedTokens,
    kinds: dict[str, int | None],
    implementation: str,
    dtype: torch.dtype,
    first: int = 0,
) -> Any:
    """What a decoder takes as `attention_mask` for a packed batch.

    Args:
        kinds: of `traits.mask_kinds`.
        implementation: the model's attn_implementation.
        dtype: of the model, for eager attention's additive masks.
        first: the queries are the columns from here on; keys are all columns.

    Returns:
        A mask, or one for each layer type where the model has several.

    Raises:
        UnsupportedModelError: an attention that takes no such mask.
    """
    check_attention(implementation)
    if implementation == FLEX:
        masks = {kind: flex_mask(tokens, kind, size, first) for kind, size in kinds.items()}
    else:
        additive = dtype if implementation == "eager" else None
        masks = {
            kind: dense_mask(tokens, kind, size, additive, first) for kind, size in kinds.items()
        }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def check_attention(implementation: str) -> None:
    """Refuse an attention that would ignore the packed mask."""
    if implementation not in (*_DENSE, FLEX):
        raise UnsupportedModelError(
            f"attn_implementation={implementation!r} takes no mask of one's own, which a packed "
            "batch needs; call model.set_attn_implementation('sdpa'), or 'flex_attention' on a GPU"
        )
