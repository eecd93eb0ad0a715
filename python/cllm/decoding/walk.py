"""Forwards past the model's own, where its native layers are one call on a CPU.

Of an iteration of few rows over a small model transformers' forward takes a share: it makes masks
that native layers do not read, copies its list of layers, and calls thirty that hand on what the
first one gave. What is left of it without those are five modules, called here. Prompts go the same
way, in pieces: between the products of all rows lies as much for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding
from torch.nn.modules import module as torch_module

from .cache import BlockPlan, RaggedCache
from .layers import NativeLayer, untouched

# Rows of a forward over a piece of the prompts, and the longest prompts that go so. Up to there it
# measured no slower than torch's products and attention of all rows at once; beyond, attention
# counts, and torch's reads a key for more rows together.
PIECE_ROWS = 128
LONGEST_PROMPT = 4096
# rotary positions whose angles hang on nothing else; those of others go by the longest text so far
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


def walks(model: Any, attention: str) -> bool:
    """Whether forwards of `model`, a causal language model, may go past its own in a layout of this
    attention: not in others, and not where somebody has hooked or replaced its own."""
    if attention != "native" or model.device.type != "cpu":
        return False
    return untouched(model) and untouched(model.model)


class Walk:
    """Past the forward of a model in `walks`: embedding, rotary table, native layers, final norm,
    which are that of every family that has native layers. The modules are called as such, so that
    hooks on them run.

    It keeps no model, which has to be the same one in every call, so that it keeps none alive.

    Args:
        position_limit: no token is given a position at or beyond it.
    """

    def __init__(self, position_limit: int | None):
        self._limit = position_limit
        # cos and sin [1, capacity, D] of all positions that the cache has room for
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def prefill(self, model: Any, cache: RaggedCache, input_ids: torch.Tensor) -> bool:
        """Fill an empty cache from right-padded prompts [B, P], piece by piece, up to the last
        layer.

        Returns:
            Whether it did; what torch is faster for is left to it.
        """
        batch, width = input_ids.shape
        step = PIECE_ROWS // batch
        if not step or width > LONGEST_PROMPT or _has_tiles(model.dtype):
            return False
        if not _has_fixed_rotations(model.model.rotary_emb):
            return False  # a piece would get the angles of a text that ends with it
        cache.plan.reserve(width)
        columns = torch.arange(min(step, width), device=input_ids.device)
        for start in range(0, width, step):
            piece = input_ids[:, start : start + step]
            lengths = torch.full((batch,), start, device=input_ids.device)
            cache.plan.start_window(lengths, [start] * batch, piece.shape[1])
            if self._through_layers(model, cache, piece, columns[: piece.shape[1]]) is None:
                return False
        return True

    def hidden_states(
        self, model: Any, cache: RaggedCache, tokens: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor | None:
        """What the head of `model` makes logits of.

        Args:
            cache: whose plan is that of a window.
            tokens: [B, n].
            offsets: [n] from the plan's lengths to the tokens' positions.

        Returns:
            [B, n, H]; None where the layers are no single call, as when another model shares some,
            or somebody is to hear of each of them.
        """
        hidden = self._through_layers(model, cache, tokens, offsets)
        return None if hidden is None else model.model.norm(hidden)

    def _through_layers(
        self, model: Any, cache: RaggedCache, tokens: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor | None:
        """[B, n, H] behind the last layer, or None."""
        if torch_module._has_any_global_hook():
            return None
        inner = model.model
        first = getattr(inner.layers[0].forward, "__self__", None)
        stack = first.stack(cache) if isinstance(first, NativeLayer) else None
        if stack is None or not stack.in_place():
            return None
        hidden = inner.embed_tokens(tokens)
        cos, sin = self._rotary(inner.rotary_emb, hidden, cache.plan, offsets)
        hidden = stack(hidden, cos, sin, cache)
        stack.latest = None  # no layer behind it is to hand it on
        return hidden

    def _rotary(
        self, rotary: Any, hidden: torch.Tensor, plan: BlockPlan, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B or 1, n, D] of the tokens' positions.

        Where a position's are its own they are looked up, so that a token has the same bits in
        whatever window: a vectorised cosine may round the last few of a tensor otherwise.
        """
        assert plan.lengths is not None
        if not (_has_fixed_rotations(rotary) and untouched(rotary)):
            positions = plan.lengths[:, None] + offsets
            if self._limit is not None:
                positions = positions.clamp(max=self._limit - 1)
            cos, sin = rotary(hidden, position_ids=positions)
            return cos, sin
        table = self._table
        if table is None or table[0].shape[1] < plan.capacity or table[0].dtype != hidden.dtype:
            places = torch.arange(plan.capacity, device=offsets.device)[None]
            if self._limit is not None:
                places = places.clamp(max=self._limit - 1)
            table = self._table = rotary(hidden, position_ids=places)
        cos, sin = table
        if plan.batch == 1 and plan.guesses_from is None and not plan.indexed:
            start, width = plan.single, offsets.shape[0]
            return cos.narrow(1, start, width), sin.narrow(1, start, width)
        positions = plan.lengths[:, None] + offsets
        return embedding(positions, cos[0]), embedding(positions, sin[0])


def _has_fixed_rotations(rotary: Any) -> bool:
    return getattr(rotary, "rope_type", None) in _FIXED_ROTATIONS


def _has_tiles(dtype: torch.dtype) -> bool:
    """Whether torch multiplies many rows of this type in a CPU's matrix units (AMX), which the
    kernels here do not use."""
    return dtype is not torch.float32 and torch.cpu._is_amx_tile_supported()
