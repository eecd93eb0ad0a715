"""From what the model gives for every window token to the token behind it: argmax or a sample,
behind logits processors or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers.generation import logits_process

import cllm_kernels

from ..head import LanguageHead
from ..traits import UnsupportedModelError
from .layers import untouched
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
        ends: token ids behind which a row has no text.
    """

    def __init__(
        self,
        processors: Sequence[Callable[..., torch.Tensor]] = (),
        noise: SamplingNoise | None = None,
        head: LanguageHead | None = None,
        ends: Collection[int] = (),
    ):
        self.processors = list(processors)
        self.rowwise = [entry for entry in self.processors if type(entry) in _ROWWISE]
        self.noise = noise
        self.head = head
        self.ends = frozenset(ends)

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
            starts: the same on the host; -1: the row has ended, and any token will do.

        Returns:
            [B, n] int64, contiguous.
        """
        run = None if columns is None else columns_from(columns, given.shape[1])
        if not self.needs_prefixes:
            return self.guesses(given, run)
        predictions, first = self._behind_right_guesses(given, window, sequences, run, starts)
        missing = min(first, default=given.shape[1])
        if missing < given.shape[1]:
            rest = self.guesses(
                given[:, missing:], None if run is None else run[:, missing:].contiguous()
            )
            places = torch.arange(missing, given.shape[1], device=window.device)
            lacking = places >= torch.tensor(first, device=window.device)[:, None]
            predictions[:, missing:] = torch.where(lacking, rest, predictions[:, missing:])
        return predictions

    def _behind_right_guesses(
        self,
        given: torch.Tensor,
        window: torch.Tensor,
        sequences: torch.Tensor,
        run: torch.Tensor | None,
        starts: list[int],
    ) -> tuple[torch.Tensor, list[int]]:
        """Predictions behind logits processors, each position with the prefix it would see one
        token at a time, as far as a row's guesses are right.

        Position i of row b is scored behind the prefix
        ``sequences[b, :starts[b]] + window[b, 1:i+1]``: a piece of the text, as what has state, or
        knows which texts there can be, is to see nothing else.

        Rows stand at different lengths while a processor takes one rectangle, so rows of equal
        length go together, each in its own place in the batch (some processors index by row). The
        other places hold their own text as far as it goes, else a copy.

        Args:
            run: [B, n] columns of the tokens, or None where there is no noise.
            others: as in `tokens`.

        Returns:
            [B, n] int64, and of every row how many of its predictions are filled in.
        """
        predictions = torch.empty_like(window)
        first = [0] * window.shape[0]
        for start in sorted({start for start in starts if start >= 0}):
            rows = [row for row, own in enumerate(starts) if own == start]
            for offset in range(min(window.shape[1], sequences.shape[1] - start)):
                if offset:
                    guesses = window[rows, offset].tolist()
                    right = predictions[rows, offset - 1].tolist()
                    rows = [
                        row
                        for row, guess, token in zip(rows, guesses, right, strict=True)
                        if guess == token and token not in self.ends
                    ]
                if not rows:
                    break
                prefix = sequences[:, : start + offset].clone()
                prefix[rows, start:] = window[rows, 1 : offset + 1]
                shorter = {row for row, own in enumerate(starts) if own < start + offset}
                prefix[sorted(shorter - set(rows))] = prefix[rows[0]].clone()
                scores = given[:, offset].to(torch.float32, copy=True)
                for processor in self.processors:
                    if type(processor) is logits_process.PrefixConstrainedLogitsProcessor:
                        scores = _constrained(processor, prefix, scores, rows)
                    else:
                        scores = processor(prefix, scores)
                if self.noise is not None and run is not None:
                    column = run[:, offset : offset + 1].contiguous()
                    scores = scores + self.noise.at(column, scores.shape[-1])[:, 0]
                predictions[rows, offset] = scores[rows].argmax(dim=-1)
                for row in rows:
                    first[row] = offset + 1
        return predictions, first

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
    if not (untouched(model) and untouched(model.get_output_embeddings())):
        return None  # whoever hooked them is to see the logits
    try:
        return LanguageHead.of(model)
    except UnsupportedModelError:  # a quantised head, say; its logits serve as well
        return None


def only_temperature(processors: Sequence[Any]) -> bool:
    """Whether `processors` are a temperature at most, which `linear_argmax` takes itself."""
    kinds = [type(entry) for entry in processors]
    return kinds in ([], [logits_process.TemperatureLogitsWarper])


def _constrained(
    processor: Any, prefix: torch.Tensor, scores: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """What transformers' `PrefixConstrainedLogitsProcessor` makes of the scores [B, V] of `rows`;
    it would ask for all rows of the batch, and the user's function may know its rows by number:
    the prompt's, which `num_return_sequences` rows share."""
    scores = scores.clone()
    for row in rows:
        allowed = processor._prefix_allowed_tokens_fn(row // processor._num_beams, prefix[row])
        if len(allowed) == 0:
            raise ValueError(
                f"prefix_allowed_tokens_fn allows no token behind the {prefix.shape[1]} tokens of "
                f"row {row}; let it return at least one, the end token, say"
            )
        mask = torch.full_like(scores[row], float("-inf"))
        mask[allowed] = 0
        scores[row] += mask
        if bool(scores[row].amax().isneginf()):  # all that is allowed was forbidden before
            scores[row] = mask
    return scores


def columns_from(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[B, n]: n columns from each of `columns` [B] on."""
    return columns[:, None] + torch.arange(width, device=columns.device)
