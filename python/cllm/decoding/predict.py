"""From what the model gives for every window token to the token behind it: argmax or a sample,
behind logits processors or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import logits_process

import cllm_kernels

from ..head import LanguageHead
from ..traits import UnsupportedModelError
from .sampling import SamplingNoise

# Of transformers' processors those that look at a row of scores alone, so that all positions of a
# window are rows to them. A subclass may do anything, so exact types only.
_ROWWISE = frozenset(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
    if hasattr(logits_process, name)
)


class Predictor:
    """Chooses tokens.

    Args:
        processors: logits processors, in order; may be empty.
        noise: makes every choice a sample; None: the most likely token.
        head: given where the forward gives hidden states instead of logits; then `processors` hold
            a temperature at most (`only_temperature`).
    """

    def __init__(
        self,
        processors: Sequence[Callable[..., torch.Tensor]] = (),
        noise: SamplingNoise | None = None,
        head: LanguageHead | None = None,
    ):
        self.processors = list(processors)
        self.rowwise = [entry for entry in self.processors if type(entry) in _ROWWISE]
        self.noise = noise
        self.head = head

    def tokens(
        self,
        given: torch.Tensor,
        window: torch.Tensor,
        sequences: torch.Tensor,
        columns: torch.Tensor | None,
        starts: list[int],
    ) -> torch.Tensor:
        """The tokens that one-token decoding would choose, where the window's guesses are right.

        Args:
            given: [B, n, V] logits, or [B, n, H] hidden states with a head.
            window: [B, n] int64.
            sequences: [B, L] int64, padded prompts and committed tokens.
            columns: [B] column of `sequences` that the token behind ``window[b, 0]`` is for; None
                where there is no noise.
            starts: the same on the host.

        Returns:
            [B, n] int64, contiguous.
        """
        run = None if columns is None else columns_from(columns, given.shape[1])
        if not self.needs_prefixes:
            return self.guesses(given, run)
        noise = None
        if self.noise is not None and run is not None:
            noise = self.noise.at(run, given.shape[-1])
        return processed_argmax(self.processors, given, window, sequences, starts, noise)

    @property
    def needs_prefixes(self) -> bool:
        """Whether a choice depends on more than the place and what the model gives there."""
        return len(self.rowwise) < len(self.processors)

    def guesses(self, given: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Tokens chosen without their prefixes: processors that need those are left out.

        Args:
            given: [B, n, V] logits, or [B, n, H] hidden states with a head.
            columns: [B, n] column that each token is for; None where there is no noise.

        Returns:
            [B, n] int64, contiguous.
        """
        shape = given.shape[:2]
        rows = given.flatten(0, 1)
        if self.head is not None:
            temperature = _temperature(self.rowwise)
            key = None
            if self.noise is not None and columns is not None:
                key = self.noise.key(columns)
            return self.head.argmax(rows, temperature=temperature, noise=key).view(shape)
        if self.rowwise:
            rows = rows.to(torch.float32, copy=True)
            for processor in self.rowwise:
                rows = processor(None, rows)
        if self.noise is not None and columns is not None:
            rows = rows.float() + self.noise.at(columns, rows.shape[-1]).flatten(0, 1)
        return cllm_kernels.row_argmax(rows)[0].view(shape)


def _temperature(processors: Sequence[Any]) -> float | None:
    return next((entry.temperature for entry in processors), None)


def fused_head(model: Any) -> LanguageHead | None:
    """The head whose product and choice `linear_argmax` makes at once; None if it cannot.

    Samples alone go through it. The most likely of 16-bit logits is HuggingFace's only where they
    are rounded to 16 bits first, which makes ties of near-ties.
    """
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    try:
        return LanguageHead.of(model)
    except UnsupportedModelError:  # a quantised head, say; its logits serve as well
        return None


def only_temperature(processors: Sequence[Any]) -> bool:
    """Whether `processors` are a temperature at most, which `linear_argmax` takes itself."""
    kinds = [type(entry) for entry in processors]
    return kinds in ([], [logits_process.TemperatureLogitsWarper])


def processed_argmax(
    processors: Sequence[Callable[..., torch.Tensor]],
    logits: torch.Tensor,
    window: torch.Tensor,
    sequences: torch.Tensor,
    starts: list[int],
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predictions after logits processors, each position with the prefix it would see one token at
    a time.

    Position i of row b is scored behind the prefix ``sequences[b, :starts[b]] + window[b, 1:i+1]``.
    Where the guesses in it are right, that is the very prefix of one-token decoding, so the
    prediction is too; where they are wrong, the prediction is a guess in any case.

    Rows stand at different lengths while a processor takes one rectangle, so rows of equal length
    go together, each in its own place in the batch (some processors index by row), and the other
    places hold a copy.

    Args:
        logits: [B, n, V].
        window: [B, n] int64.
        sequences: [B, L] int64, padded prompts and committed tokens.
        starts: per row, the tokens of `sequences` up to and including ``window[b, 0]``.
        noise: [B, n, V] that is added behind the processors, or None.

    Returns:
        [B, n] int64.
    """
    batch, width, _ = logits.shape
    predictions = torch.empty_like(window)
    chain: Any = logits_process.LogitsProcessorList(processors)
    for start in sorted(set(starts)):
        rows = [row for row in range(batch) if starts[row] == start]
        members = torch.tensor(rows, device=window.device)
        source = torch.full((batch,), rows[0], device=window.device)
        source[members] = members
        prefix = torch.cat([sequences[source, :start], window[source, 1:]], dim=1)
        for offset in range(width):
            scores = logits[source, offset].to(torch.float32, copy=True)
            scores = chain(prefix[:, : start + offset], scores)
            if noise is not None:
                scores = scores + noise[source, offset]
            predictions[members, offset] = scores.argmax(dim=-1)[members]
    return predictions


def columns_from(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[B, n]: n columns from each of `columns` [B] on."""
    return columns[:, None] + torch.arange(width, device=columns.device)
