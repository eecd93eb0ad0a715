"""The block forward: n tokens of every row through the public forward and a ragged cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..head import LanguageHead
from .cache import BlockPlan, RaggedCache
from .masks import block_mask, chains_mask, window_mask
from .prefill import padded, padded_width
from .storage import storage_for
from .support import ModelTraits
from .walk import Walk, walks

if TYPE_CHECKING:
    from .layouts import Layout

# Of positions [B, rows] the 2D mask, or 4D masks by layer type.
Masks = Callable[[torch.Tensor], Any]


class BlockForward:
    """A model, its ragged cache, and the masks and positions that make a batch ragged.

    Args:
        model: a transformers causal language model in eval mode.
        traits: of `support.check_model`.
        batch: B, the number of rows.
        slots: most cache slots that a row can come to need.
        position_limit: no window token is given a position at or beyond it; only guesses past the
            end of the text would be.
        layout: of `choose_layout`; its `applied` context must surround every forward.
        head: windows give the hidden states that it makes logits of, instead of logits.
        fixed: the cache has its full size from the start, so that nothing ever changes its shape.

    Attributes:
        walk: what goes past the model's own forward; None: nothing does.
    """

    def __init__(
        self,
        model: Any,
        traits: ModelTraits,
        *,
        batch: int,
        slots: int,
        device: torch.device,
        position_limit: int | None,
        layout: Layout,
        head: LanguageHead | None = None,
        fixed: bool = False,
    ):
        self.model = model
        self.head = head
        self.fixed = fixed
        self.traits = traits
        self.plan = BlockPlan(
            batch,
            slots,
            device,
            right_aligned=layout.right_aligned,
            constant_view=fixed or (traits.additive_masks and layout.attention != "block"),
            handed=layout.attention == "block",
            native=layout.attention == "native",
            storage=storage_for(model) if fixed else None,
        )
        self.cache = RaggedCache(self.plan)
        self.weights = sum(one.numel() for one in model.parameters()) if fixed else 0
        self.position_limit = position_limit
        self.mask_dtype = model.dtype if traits.additive_masks else None
        self.block_masks = {
            kind: block_mask(self.plan, size, model.dtype)
            for kind, size in traits.mask_kinds.items()
            if self.plan.handed
        }
        self.walk = Walk(position_limit) if walks(model, layout.attention) else None
        self._columns: dict[tuple[int, int, int], torch.Tensor] = {}
        self._call: dict[str, Any] = {traits.cache_argument: self.cache, "use_cache": True}

    def prefill(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """Fill the cache from right-padded prompts.

        Args:
            input_ids: [B, P], row b holding its tokens at ``0 .. lengths[b] - 1``.
            lengths: [B].
        """
        if self.walk is not None and self.walk.prefill(self.model, self.cache, input_ids):
            return
        input_ids = padded(input_ids, self.prefill_width(input_ids) or input_ids.shape[1])
        width = input_ids.shape[1]
        self.plan.start_prefill(width)
        call = dict(self._call, input_ids=input_ids, attention_mask=None)
        columns = torch.arange(width, device=input_ids.device)
        if self.traits.takes_positions:
            # what stands behind all prompts is padding, at no position that a text has not
            call["position_ids"] = columns.minimum(lengths.max() - 1).expand_as(input_ids)
        if self.plan.right_aligned:
            call["attention_mask"] = (columns < lengths[:, None]).long()
        if self.traits.takes_logits_to_keep:
            call["logits_to_keep"] = 1
        self.model(**call)

    def prefill_width(self, input_ids: torch.Tensor) -> int | None:
        """That prompts [B, P] are padded to, so that there are few shapes; None: they are not."""
        # without positions of its own a model would count on behind the last one that it has, and
        # without a choice of logits make those of all tokens
        chosen = self.traits.takes_positions and self.traits.takes_logits_to_keep
        if not (self.fixed and chosen) or self.plan.right_aligned:
            return None
        batch, width = input_ids.shape
        return padded_width(batch, width, self.weights)

    def window(
        self, tokens: torch.Tensor, lengths: torch.Tensor, host_lengths: list[int]
    ) -> torch.Tensor:
        """Logits after every token of every row's window.

        Args:
            tokens: [B, n], row b's token i standing at position ``lengths[b] + i``.
            lengths: [B] tokens of each row in the cache; `host_lengths` the same on the host.

        Returns:
            [B, n, V] in the model's dtype; with a head [B, n, H].
        """
        width = tokens.shape[1]
        self.plan.start_window(lengths, host_lengths, width)

        def masks(positions: torch.Tensor) -> Any:
            if self.plan.right_aligned:
                return self.plan.key_mask(lengths)
            return self.block_masks or {
                kind: window_mask(positions, self.plan.view, kind, size, self.mask_dtype)
                for kind, size in self.traits.mask_kinds.items()
            }

        return self._logits(tokens, self._offsets(width, width), masks)

    def gated_window(
        self, tokens: torch.Tensor, verify: int, lengths: torch.Tensor, host_lengths: list[int]
    ) -> torch.Tensor:
        """Logits of a window that stands twice: its first tokens as verify rows, then all of it as
        guess rows, both from position ``lengths[b]`` on.

        Verify rows give the bits of `window` over as many rows. What is left in the cache behind
        the verify rows is overwritten by the next forward. The gate is the caller's to open.

        Args:
            tokens: [B, n].
            verify: v, from 1 to n.
            lengths, host_lengths: as in `window`.

        Returns:
            [B, v + n, V].
        """
        width = tokens.shape[1]
        self.plan.start_window(
            lengths, host_lengths, verify + width, guesses_from=verify, unsure_from=verify
        )
        twice = torch.cat([tokens[:, :verify], tokens], dim=1)
        offsets = self._offsets(verify, verify + width)
        return self._logits(twice, offsets, partial(self._chains, verify, width))

    def candidate_windows(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        host_lengths: list[int],
        checked: int | None = None,
    ) -> torch.Tensor:
        """Logits of several windows for the same places, each of which sees itself alone.

        Args:
            tokens: [B, C, n], token i of every candidate standing at position ``lengths[b] + i``.
            lengths, host_lengths: as in `window`.
            checked: so many of them, the first, can be kept; those behind are guess rows of an
                adapter, whose gate is the caller's to open. None: all.

        Returns:
            [B, C, n, V]; with a head [B, C, n, H]. The first candidate is in the cache as a window
            is; `keep` puts another one there.
        """
        batch, count, width = tokens.shape
        self.plan.start_window(
            lengths,
            host_lengths,
            count * width,
            guesses_from=width,
            guess_width=width,
            unsure_from=None if checked is None else checked * width,
        )
        offsets = self._offsets(width, count * width)
        given = self._logits(tokens.flatten(1), offsets, partial(self._chains, width, width))
        return given.view(batch, count, width, -1)

    def _offsets(self, first: int, rows: int) -> torch.Tensor:
        """[rows]: how far each row's token stands behind the first one of its window, in windows
        for the same places: one of `first` rows, then others."""
        others = self.plan.guess_width or rows - first
        key = first, others, rows
        found = self._columns.get(key)
        if found is None:
            found = torch.arange(rows, device=self.plan.device)
            if rows > first:
                found = torch.cat([found[:first], found[: rows - first] % others])
            if self.plan.device.type == "cpu":  # a captured one is in the memory of its capture
                self._columns[key] = found
        return found

    def _chains(self, first: int, others: int, positions: torch.Tensor) -> dict[str, Any]:
        """Masks of windows for the same places, by layer type: of `first` rows, then of `others`
        each."""
        return self.block_masks or {
            kind: chains_mask(positions, first, others, self.plan.view, kind, size, self.mask_dtype)
            for kind, size in self.traits.mask_kinds.items()
        }

    def keep(self, lengths: torch.Tensor, candidate: torch.Tensor, width: int) -> None:
        """Put keys and values of one candidate of the latest `candidate_windows` where a window's
        are.

        Args:
            lengths: [B] as they were then.
            candidate: [B] number of the candidate.
            width: n.
        """
        # a CPU need not wait to know; what is captured may not ask
        known = candidate.is_cpu and not self.fixed
        if width == 1 or (known and not bool(candidate.any())):
            return
        # the first token is the same in all
        target = lengths[:, None] + torch.arange(1, width, device=lengths.device)
        self.cache.move(target + candidate[:, None] * width, target)

    def _logits(self, tokens: torch.Tensor, offsets: torch.Tensor, masks: Masks) -> torch.Tensor:
        """The public forward, up to the head if there is one, or what stands for it.

        Args:
            tokens: [B, rows].
            offsets: [rows] of `_offsets`.
            masks: of their positions.
        """
        if self.walk is not None:
            hidden = self.walk.hidden_states(self.model, self.cache, tokens, offsets)
            if hidden is not None:
                return hidden if self.head is not None else self.model.lm_head(hidden)
        call = self._arguments(tokens, offsets, masks)
        if self.head is None:
            given = self.model(**call).logits
        else:
            for name in (self.traits.cache_argument, "use_cache"):
                del call[name]
            given = self.head.hidden_states(self.cache, **call)
        self.plan.check_taken()
        return given

    def _arguments(self, tokens: torch.Tensor, offsets: torch.Tensor, masks: Masks) -> dict:
        """Of the public forward; arguments as of `_logits`."""
        assert self.plan.lengths is not None
        positions = self.plan.lengths[:, None] + offsets
        call, mask = dict(self._call, input_ids=tokens), masks(positions)
        if isinstance(mask, dict) and not self.traits.mask_dict:
            mask = next(iter(mask.values()))
        call["attention_mask"] = mask
        if self.traits.takes_positions:
            if self.position_limit is not None:
                positions = positions.clamp(max=self.position_limit - 1)
            call["position_ids"] = positions
        return call
