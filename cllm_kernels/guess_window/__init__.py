"""guess_window: better guesses for a window, from the text itself and from earlier predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, eager
from cllm_kernels.guess_window.arguments import check_sources, kept_together


def _reference() -> Any:
    from cllm_kernels.guess_window import reference

    return reference.guess_window


def _cpp() -> Any:
    from cllm_kernels.guess_window import native

    return native.guess_window_cpu


def _triton() -> Any:
    from cllm_kernels.guess_window import triton_kernel

    return triton_kernel.guess_window


OP = register(
    Op(
        name="guess_window",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def guess_window(
    window: Tensor,
    latest: Tensor | None = None,
    sequences: Tensor | None = None,
    generated: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    longest: int = 3,
    least: int = 1,
    end: int | None = None,
    odds: Tensor | None = None,
    proposed: Tensor | None = None,
    since: Tensor | None = None,
) -> None:
    """Puts better guesses behind the first token of every row's window.

    Where the last tokens of a row's text stand earlier in it, what followed the latest of their
    longest occurrences is guessed (prompt lookup decoding, Saxena 2023); where that is less than
    n - 1 tokens ago, the tokens since then again and again. Else every guess is the latest token
    that is known behind the one before it (an n-gram pool with n = 2, lookahead decoding, Fu et
    al. 2024, arXiv 2402.02057), and where none is known the window's own.

    With `odds` the three do not come in this order. What was proposed in the call before is first
    compared with what the text has become since, up to the first guess that was wrong, and counted.
    Then the source is taken whose kind of guess has most right ones for each wrong one, which
    estimates the length of a run of right guesses where the text cuts some off.

    Args (int64, contiguous, on one device; B rows):
        window: [B, n], mutated; w[0] is the last committed token and stays.
        latest: [B, V] or None: of every token the latest one behind it, as stamp * V + token; -1
            where none is known. A token outside of [0, V) has none.
        sequences: [B, L] or None, of row b the text in columns starts[b] .. generated[b] - 1; given
            with generated [B] and starts [B].
        longest: most tokens of the text's end that are compared, at least 1; with `odds` at least
            0, for which no text is searched.
        least: fewest that must be found again for the text to guess, at least 1.
        end: columns of sequences that are looked at, 1 to L, or None: all; no row's text may go
            beyond it. It spares the reference work.
        odds: [B, 2 + longest, 2] or None, mutated; given with proposed, since and sequences. How
            often a kind of guess was right and how often it was wrong, at least 0 and in units of
            `reference.GUESS`: kind 0 the window's own, 1 the pool's, 1 + e text's whose end was
            found again with e tokens. Of sources with the same ratio the later kind is taken. Once
            a call both counts are halved where they come to more than `reference.MEMORY`.
        proposed: [B, 3, n], mutated: of window, pool and text the kind of their guesses, -1 where
            there are none, and the guesses. The kinds of a row differ.
        since: [B], mutated: `generated` when those were made; -1: none were.

    Raises:
        ValueError: a shape, layout, device or number that does not fit, or nothing to guess from.
        TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    tensors, end = check_sources(
        "guess_window",
        window,
        latest,
        sequences,
        generated,
        starts,
        longest,
        least,
        end,
        odds,
        proposed,
        since,
    )
    guess = (
        OP.resolve(window.device)
        if eager(*tensors)
        else torch.ops.cllm_kernels.guess_window.default
    )
    guess(
        window,
        latest,
        sequences,
        generated,
        starts,
        longest,
        least,
        end,
        odds,
        proposed,
        since,
    )


LIBRARY.define(
    "guess_window(Tensor(a!) window, Tensor? latest, Tensor? sequences, Tensor? generated, "
    "Tensor? starts, int longest, int least, SymInt end, Tensor(b!)? odds, Tensor(c!)? proposed, "
    "Tensor(d!)? since) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(window: Tensor, *rest: Any) -> None:
    kept_together("guess_window", *rest[-3:])
    OP.resolve(window.device)(window, *rest)


def _fake(window: Tensor, *_: Any) -> None:
    return None


LIBRARY.impl("guess_window", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::guess_window", _fake, lib=LIBRARY)
