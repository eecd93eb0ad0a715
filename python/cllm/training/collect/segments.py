"""Noisy segments over a cached clean text: what a model needs to predict behind wrong guesses
without reading the text before them again.

A row holds a text, whose keys and values are cached once, and any number of segments: guesses that
stand at a place of the text and see the text before that place, themselves, and nothing else.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ...head import LanguageHead
from ...traits import CHUNKED, SLIDING, UnsupportedModelError, cache_argument, mask_kinds


@dataclass
class _Plan:
    """What all layers of a forward share: where the text ends and the segments begin.

    Attributes:
        room: most segment tokens a row that will come.
        clean: tokens a row of the texts.
        reading: the texts themselves are being read.
        width: tokens a row of the current forward.
    """

    room: int
    clean: int = 0
    reading: bool = True
    width: int = 0


class SegmentLayer(CacheLayerMixin):
    """One layer's keys and values [B, heads, C + room, D]: the text's, then the segments' of the
    latest forward, which the next one writes over."""

    is_sliding = False

    def __init__(self, plan: _Plan):
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, *args: Any) -> None:
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _allocate(self, states: Tensor) -> Tensor:
        batch, heads, clean, size = states.shape
        # zeros, not empty: a masked slot takes part in a product with weight 0, and 0 * NaN is NaN
        return states.new_zeros(batch, heads, clean + self.plan.room, size)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, C or S, D] of the forward; returns all that it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start = 0 if self.plan.reading else self.plan.clean
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        assert self.keys is not None and self.values is not None
        self.keys = self.keys.index_select(0, rows.to(self.keys.device))
        self.values = self.values.index_select(0, rows.to(self.values.device))

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.plan.width if self.plan.reading else self.plan.clean + self.plan.width, 0

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.plan.reading else self.plan.clean

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before transformers 5.20 or so."""
        return -1


class SegmentForward:
    """A model that has read one text a row and now reads segments.

    Args:
        model: a transformers causal language model in eval mode.
        room: most segment tokens that a row will have in one forward.

    Raises:
        UnsupportedModelError: an architecture or attention implementation that takes no mask and
            position per token.
    """

    def __init__(self, model: Any, room: int):
        self.head = LanguageHead.of(model)
        self.decoder = self.head.decoder
        inner = self.head.model
        name = type(inner).__name__
        text = inner.config.get_text_config()
        self.kinds = mask_kinds(name, text)
        implementation = getattr(text, "_attn_implementation", None) or "eager"
        if implementation not in ("eager", "sdpa", "cllm"):
            raise UnsupportedModelError(
                f"{name} uses attn_implementation={implementation!r}, which takes no mask per "
                "token; call model.set_attn_implementation('sdpa') first"
            )
        self.mask_dtype = inner.dtype if implementation == "eager" else None
        parameters = inspect.signature(self.decoder.forward).parameters
        cache_name = cache_argument(parameters)
        for needed, there in (
            ("past_key_values", cache_name), ("position_ids", "position_ids" in parameters)
        ):  # fmt: skip
            if not there:
                raise UnsupportedModelError(
                    f"the decoder of {name} takes no {needed}, so its trajectories cannot be "
                    "collected for all blocks at once"
                )
        self.cache_name = str(cache_name)
        self.plan = _Plan(room=room)
        # called without arguments for every layer that the model turns out to have
        self.cache = Cache(layer_class_to_replicate=partial(SegmentLayer, self.plan))  # type: ignore[arg-type]

    def read(self, tokens: Tensor) -> Tensor:
        """Read the texts [B, C], right-padded, and cache them; returns hidden states [B, C, H]."""
        self.plan.reading = True
        self.plan.clean = self.plan.width = tokens.shape[1]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self._hidden(tokens, None, positions)

    def segments(
        self, tokens: Tensor, segment: Tensor, positions: Tensor, visible: Tensor
    ) -> Tensor:
        """Read segments.

        Args:
            tokens: [B, S].
            segment: [B, S] number of the token's segment; -1 for padding.
            positions: [B, S] place in the row's text; 0 for padding.
            visible: [B, S] tokens of the text that the token may attend to; 1 for padding, which
                must attend to something.

        Returns:
            Hidden states [B, S, H].
        """
        self.plan.reading, self.plan.width = False, tokens.shape[1]
        clean = self.plan.clean
        masks: Any = {
            kind: segment_mask(segment, positions, visible, clean, kind, size, self.mask_dtype)
            for kind, size in self.kinds.items()
        }
        if len(masks) == 1:
            masks = next(iter(masks.values()))
        return self._hidden(tokens, masks, positions)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these ([rows] int64)."""
        for layer in self.cache.layers:
            layer.keep(rows)  # type: ignore[union-attr]

    def _hidden(self, tokens: Tensor, masks: Any, positions: Tensor) -> Tensor:
        return self.decoder(
            input_ids=tokens,
            attention_mask=masks,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{self.cache_name: self.cache},
        ).last_hidden_state


_proved: weakref.WeakKeyDictionary[Any, set[tuple[str, torch.dtype]]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def check_segments(model: Any) -> None:
    """Prove once per model that segments give what its plain forward gives for their text.

    A model that reads positions off the places of the keys, say, would give other trajectories
    without a word.

    Raises:
        UnsupportedModelError: if it does not.
    """
    head = LanguageHead.of(model)
    inner = head.model
    key = str(inner.config.get_text_config()._attn_implementation), inner.dtype
    known = _proved.setdefault(inner, set())
    if key in known:
        return
    try:
        error = _probe(model, head)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as failure:
        if isinstance(failure, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{type(inner).__name__} cannot be fed guesses at several places of a text at once, as "
            f"collecting does: {type(failure).__name__}: {failure}"
        ) from failure
    # far above rounding, far below what a wrong mask or position does to the logits
    if not error < (1e-2 if inner.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnsupportedModelError(
            f"{type(inner).__name__} gives other logits (relative difference {error:.2g}) when it "
            "is fed guesses at several places of a text at once, so its trajectories cannot be "
            "collected this way"
        )
    known.add(key)


def _probe(model: Any, head: LanguageHead) -> float:
    """Largest relative error (2-norm over the vocabulary) of two segments in each of two rows."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(embedding.shape[0], head.weight.shape[0])
    text, guesses = (
        torch.randint(vocabulary, (2, size), generator=generator).to(embedding.device)
        for size in (12, 6)
    )
    starts = [[7, 2], [5, 9]]
    forward = SegmentForward(model, 6)
    forward.read(text)
    number = torch.tensor([0, 0, 0, 1, 1, 1], device=text.device).expand(2, 6)
    visible = torch.tensor(starts, device=text.device)[:, [0, 0, 0, 1, 1, 1]]
    positions = visible + torch.arange(6, device=text.device) % 3
    found = head.logits(forward.segments(guesses, number, positions, visible)).double()
    errors = []
    for row in range(2):
        for segment, start in enumerate(starts[row]):
            own = slice(3 * segment, 3 * segment + 3)
            whole = torch.cat([text[row, :start], guesses[row, own]])
            wanted = model(input_ids=whole[None], use_cache=False).logits[0, start:].double()
            errors.append((found[row, own] - wanted).norm(dim=-1) / wanted.norm(dim=-1))
    # nan where a mask leaks garbage: that must not pass
    return float(torch.cat(errors).nan_to_num(nan=float("inf")).max())


def segment_mask(
    segment: Tensor,
    positions: Tensor,
    visible: Tensor,
    clean: int,
    kind: str,
    size: int | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """What each token of the segments [B, S] may attend to: `SegmentForward.segments`.

    Args:
        kind: of layer (`cllm.traits`), `size` its window or chunk.
        dtype: None for a boolean mask (True: attend), else an additive one of this dtype.

    Returns:
        [B, 1, S, clean + S]: the text's tokens, then the segments'.
    """
    places = torch.arange(clean, device=segment.device).expand(segment.shape[0], clean)
    queries = positions[:, :, None]
    before = places[:, None, :] < visible[:, :, None]  # [B, S, clean]
    own = segment[:, :, None] == segment[:, None, :]  # [B, S, S]
    own &= positions[:, None, :] <= queries
    allowed = torch.cat([before, own], dim=2)
    keys = torch.cat([places, positions], dim=1)[:, None, :]
    if kind == SLIDING and size is not None:
        allowed &= queries - keys < size
    elif kind == CHUNKED and size is not None:
        allowed &= queries // size == keys // size
    allowed = allowed[:, None]
    if dtype is None:
        return allowed
    additive = torch.zeros_like(allowed, dtype=dtype)
    return additive.masked_fill_(~allowed, torch.finfo(dtype).min)
