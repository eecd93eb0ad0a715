"""The block forward: n tokens of every row through the public forward and a ragged cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cllm_kernels import current_backend
from cllm_kernels.block_attention import OP as BLOCK_ATTENTION

from ..head import LanguageHead
from ..linears import block_linears
from .attention import NAME, chosen_implementation, cllm_attention
from .cache import BlockPlan, RaggedCache
from .layers import decoder_layers, native_layers
from .masks import CHUNKED, block_mask, chains_mask, window_mask
from .prefill import padded, padded_width
from .storage import storage_for
from .support import ModelTraits, UnsupportedModelError, check_model


@dataclass(frozen=True)
class Layout:
    """How a model is driven.

    Attributes:
        right_aligned: the cache layout, see `BlockPlan`.
        attention: "native" (whole decoder layers are replaced by `layers.NativeLayer`), "block"
            (attention is replaced by `attention.cllm_attention_forward` meanwhile,
            which hands block and cache to `cllm_kernels.block_attention`), "folded" (SDPA is
            replaced by the same, under masks) or "own".
    """

    right_aligned: bool
    attention: Literal["native", "block", "folded", "own"]

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """What surrounds every forward: the attention, and linear layers made for few rows."""
        with ExitStack() as stack:
            native = self.attention == "native"
            # where a token's bits are its own in every layer they are to stay so behind them
            head = [model.get_output_embeddings()] if native else []
            stack.enter_context(block_linears(model, head))
            if native:
                stack.enter_context(native_layers(model, check_model(model)))
            if self.attention != "own":
                eager = ("eager",) if self.attention == "block" else ()
                stack.enter_context(cllm_attention(model, ("sdpa", NAME, *eager)))
            yield

    def __str__(self) -> str:
        side = "right" if self.right_aligned else "left"
        return f"{side}-aligned, {self.attention} attention"


# Best first. A model that asks for its attention by name ("sdpa") cannot have it replaced; one that
# reads positions off the keys' places needs them right-aligned.
_LAYOUTS = (
    Layout(False, "native"),
    Layout(False, "block"),
    Layout(False, "folded"),
    Layout(False, "own"),
    Layout(True, "own"),
)
# Where block attention comes before SDPA over masks. On a CPU the masks of a forward are made once
# for all its layers, and SDPA reads the same keys: that measured no slower.
block_attention_devices = {"cuda"}
native_devices = {"cpu", "cuda"}
_chosen: weakref.WeakKeyDictionary[Any, dict[tuple, Layout]] = weakref.WeakKeyDictionary()


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
        self._call: dict[str, Any] = {traits.cache_argument: self.cache, "use_cache": True}

    def prefill(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> None:
        """Fill the cache from right-padded prompts.

        Args:
            input_ids: [B, P], row b holding its tokens at ``0 .. lengths[b] - 1``.
            lengths: [B].
        """
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
        positions = lengths[:, None] + torch.arange(width, device=tokens.device)
        if self.plan.right_aligned:
            masks: Any = self.plan.key_mask(lengths)
        else:
            masks = self.block_masks or {
                kind: window_mask(positions, self.plan.view, kind, size, self.mask_dtype)
                for kind, size in self.traits.mask_kinds.items()
            }
        return self._logits(tokens, positions, masks)

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
        columns = torch.arange(width, device=tokens.device)
        positions = lengths[:, None] + torch.cat([columns[:verify], columns])
        masks = self.block_masks or {
            kind: chains_mask(positions, verify, width, self.plan.view, kind, size, self.mask_dtype)
            for kind, size in self.traits.mask_kinds.items()
        }
        return self._logits(torch.cat([tokens[:, :verify], tokens], dim=1), positions, masks)

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
        columns = torch.arange(width, device=tokens.device).repeat(count)
        positions = lengths[:, None] + columns
        masks = self.block_masks or {
            kind: chains_mask(positions, width, width, self.plan.view, kind, size, self.mask_dtype)
            for kind, size in self.traits.mask_kinds.items()
        }
        given = self._logits(tokens.flatten(1), positions, masks)
        return given.view(batch, count, width, -1)

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

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor, masks: Any) -> torch.Tensor:
        """The public forward, up to the head if there is one; `masks` is the 2D mask, or 4D masks
        by layer type."""
        call = dict(self._call, input_ids=tokens)
        if isinstance(masks, dict):
            call["attention_mask"] = masks if self.traits.mask_dict else next(iter(masks.values()))
        else:
            call["attention_mask"] = masks
        if self.traits.takes_positions:
            if self.position_limit is not None:
                positions = positions.clamp(max=self.position_limit - 1)
            call["position_ids"] = positions
        if self.head is None:
            given = self.model(**call).logits
        else:
            for name in (self.traits.cache_argument, "use_cache"):
                del call[name]
            given = self.head.hidden_states(self.cache, **call)
        self.plan.check_taken()
        return given


def choose_layout(
    model: Any, traits: ModelTraits, input_ids: torch.Tensor, rows: int, *, gated: bool = False
) -> Layout:
    """The first layout in which `model` decodes rightly; found once per model and kept.

    A short ragged batch is decoded in each layout, with wrong guesses in it and a rewind over
    them, and compared with the model's forward without a cache. A model that agrees in none would
    be decoded wrongly without a word, so it is refused.

    Args:
        input_ids: [P] tokens of a real prompt, to probe with.
        rows: of the largest forward over a window, the whole batch's.
        gated: of the layouts that can tell verify rows from guess rows, probed with both.

    Raises:
        UnsupportedModelError: if no layout gives the model's own logits.
    """
    known = _chosen.setdefault(model, {})
    implementation = chosen_implementation(model.config.get_text_config())
    fitting = set()
    if input_ids.device.type in native_devices and decoder_layers(model, traits, rows):
        fitting.add("native")
    if not gated and _block_attention_runs(traits, input_ids.device):
        fitting.add("block")
    key = (implementation, model.dtype, frozenset(fitting), gated)
    if key not in known:
        known[key] = _probe(model, traits, input_ids, fitting, gated)
    return known[key]


def _block_attention_runs(traits: ModelTraits, device: torch.device) -> bool:
    """Whether the block layout is worth a try: a kernel is there, and knows the model's masks."""
    return (
        device.type in block_attention_devices
        and CHUNKED not in traits.mask_kinds
        and BLOCK_ATTENTION.choose(device, current_backend()) != "reference"
    )


def _probe(
    model: Any, traits: ModelTraits, input_ids: torch.Tensor, fitting: set[str], gated: bool
) -> Layout:
    if gated and traits.prefer_right_aligned:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads a token's position off its place among the keys, where "
            "two rows cannot share one; decode it without an adapter, and with candidates=1"
        )
    # far above rounding, far below what a wrong mask or position does to the logits
    bound = 1e-2 if model.dtype == torch.float32 else 0.1
    tokens = input_ids[torch.arange(8, device=input_ids.device) % input_ids.shape[0]]
    rows = [tokens, tokens.flip(0)[:6]]
    expected = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
    findings = []
    for layout in _LAYOUTS:
        if traits.prefer_right_aligned and not layout.right_aligned:
            continue
        if layout.attention in ("native", "block") and layout.attention not in fitting:
            continue
        if gated and layout.right_aligned:
            continue
        try:
            with layout.applied(model):
                error = _probe_error(model, traits, rows, expected, layout, gated)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as failure:
            findings.append(f"{layout}: {type(failure).__name__}: {failure}")
            continue
        if error < bound:
            return layout
        findings.append(f"{layout}: logits differ by {error:.2g} (relative)")
    raise UnsupportedModelError(
        f"{type(model).__name__} does not give the logits of its plain forward from a KV cache "
        f"driven by masks and positions{' with a window that stands twice' if gated else ''} "
        f"({'; '.join(findings)})"
    )


def _probe_error(
    model: Any,
    traits: ModelTraits,
    rows: list[torch.Tensor],
    expected: list[torch.Tensor],
    layout: Layout,
    gated: bool,
) -> float:
    """Largest relative error (2-norm over the vocabulary) of any probed token.

    Args:
        rows: token ids, [8] and [6].
        expected: their logits [8, V] and [6, V] from the plain forward.
    """
    width, verify, device = 3, 2 if gated else 0, rows[0].device
    lengths = torch.tensor([len(row) - width - 1 for row in rows], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    block = BlockForward(
        model,
        traits,
        batch=2,
        slots=8 + verify + width,
        device=device,
        position_limit=None,
        layout=layout,
    )
    block.prefill(padded[:, : int(lengths.max())], lengths)
    # wrong guesses first, so that the rewind over them is probed too
    window = _columns(padded, lengths, width)
    wrong = torch.cat([window[:, :1], window[:, :1].expand(2, width - 1)], dim=1)

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        if gated:
            return block.gated_window(tokens, verify, lengths, lengths.tolist()).float()
        return block.window(tokens, lengths, lengths.tolist()).float()

    logits_of(wrong)
    errors = []
    for _ in range(2):
        logits = logits_of(_columns(padded, lengths, width))
        for found, wanted, start in zip(logits, expected, lengths.tolist(), strict=True):
            wanted = wanted[start : start + width]
            wanted = torch.cat([wanted[:verify], wanted])
            errors.append((found - wanted).norm(dim=-1) / wanted.norm(dim=-1))
        lengths = lengths + 1
    if block.cache.untouched_layers() or not len(block.cache):
        raise RuntimeError("some layers keep their state outside the cache they were given")
    # nan where the cache leaks garbage: no layout may pass for it
    return float(torch.cat(errors).nan_to_num(nan=float("inf")).max())


def _columns(padded: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    return padded.gather(1, starts[:, None] + torch.arange(width, device=padded.device))
