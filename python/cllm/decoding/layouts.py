"""How models are driven, and which way of it is a model's: found by trying.

A model's masks, positions and cache are its own business; what it makes of those that we hand it is
seen from its logits, once per model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cllm_kernels import current_backend
from cllm_kernels.block_attention import OP as BLOCK_ATTENTION

from ..linears import block_linears
from .attention import NAME, chosen_implementation, cllm_attention
from .forward import BlockForward
from .layers import decoder_layers, native_layers
from .masks import CHUNKED
from .support import ModelTraits, UnsupportedModelError, check_model


@dataclass(frozen=True)
class Layout:
    """How a model is driven.

    Attributes:
        right_aligned: the cache layout, see `BlockPlan`.
        attention: "native" (whole decoder layers are replaced by `layers.NativeLayer`), "block"
            (attention is replaced by `attention.cllm_attention_forward` meanwhile,
            which hands block and cache to `cllm_kernels.block_attention`), "folded" (SDPA is
            replaced by the same, under masks), "compiled" (as folded, and nothing else is
            replaced, see `inductor`) or "own".
    """

    right_aligned: bool
    attention: Literal["native", "block", "folded", "compiled", "own"]

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """What surrounds every forward: the attention, and linear layers made for few rows."""
        with ExitStack() as stack:
            native = self.attention == "native"
            # where a token's bits are its own in every layer they are to stay so behind them
            head = [model.get_output_embeddings()] if native else []
            if self.attention != "compiled":
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
    Layout(False, "compiled"),
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


def choose_layout(
    model: Any,
    traits: ModelTraits,
    input_ids: torch.Tensor,
    rows: int,
    *,
    gated: bool = False,
    compiled: bool = False,
) -> Layout:
    """The first layout in which `model` decodes rightly; found once per model and kept.

    A short ragged batch is decoded in each layout, with wrong guesses in it and a rewind over
    them, and compared with the model's forward without a cache. A model that agrees in none would
    be decoded wrongly without a word, so it is refused.

    Args:
        input_ids: [P] tokens of a real prompt, to probe with.
        rows: of the largest forward over a window, the whole batch's.
        gated: of the layouts that can tell verify rows from guess rows, probed with both.
        compiled: for `inductor.CompiledForward`.

    Raises:
        UnsupportedModelError: if no layout gives the model's own logits.
    """
    known = _chosen.setdefault(model, {})
    implementation = chosen_implementation(model.config.get_text_config())
    fitting = set()
    if compiled:
        fitting.add("compiled")
    elif input_ids.device.type in native_devices and decoder_layers(model, traits, rows):
        fitting.add("native")
    if not (gated or compiled) and _block_attention_runs(traits, input_ids.device):
        fitting.add("block")
    key = (implementation, model.dtype, frozenset(fitting), gated)
    if key not in known:
        known[key] = _probe(model, traits, input_ids, fitting, gated)
    return known[key]


def check_gateable(model: Any, traits: ModelTraits) -> None:
    """Raises UnsupportedModelError if no window can stand twice among the model's keys."""
    if traits.prefer_right_aligned:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads a token's position off its place among the keys, where "
            "two rows cannot share one; decode it without an adapter, and with candidates=1"
        )


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
    if gated:
        check_gateable(model, traits)
    # far above rounding, far below what a wrong mask or position does to the logits
    bound = 1e-2 if model.dtype == torch.float32 else 0.1
    tokens = input_ids[torch.arange(8, device=input_ids.device) % input_ids.shape[0]]
    rows = [tokens, tokens.flip(0)[:6]]
    expected = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
    findings = []
    for layout in _LAYOUTS:
        if traits.prefer_right_aligned and not layout.right_aligned:
            continue
        if layout.attention in ("native", "block", "compiled") and layout.attention not in fitting:
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
    """What `judged` makes of the relative errors (2-norm over the vocabulary) of probed tokens.

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
    return judged(torch.cat(errors).detach().float(), model.dtype)


def judged(errors: torch.Tensor, dtype: torch.dtype) -> float:
    """One number for the relative errors [N] of probed tokens, to hold against a bound.

    In 16 bits a single token may be off by rounding alone, in bfloat16 by more than a tenth,
    whatever the layout; so the upper quartile counts there, and a fifth of the largest: of a wrong
    layout more than one token is wrong.
    """
    # nan where the cache leaks garbage: no layout may pass for it
    errors = errors.nan_to_num(nan=float("inf"))
    largest = float(errors.max())
    if dtype == torch.float32:
        return largest
    quartile = float(errors.sort().values[3 * errors.numel() // 4])
    return max(quartile, largest / 5)


def _columns(padded: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    return padded.gather(1, starts[:, None] + torch.arange(width, device=padded.device))
