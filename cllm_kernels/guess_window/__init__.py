"""guess_window: better guesses for a window, from the text itself and from earlier predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, check_int64, eager, shape_text


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
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"guess_window: window must be [B, n], n >= 1, not {shape_text(window)}")
    _check("window", window, window, 2)
    tensors = [window]
    if latest is not None:
        _check("latest", latest, window, 2)
        tensors.append(latest)
    if sequences is not None:
        if generated is None or starts is None:
            missing = "generated" if generated is None else "starts"
            raise ValueError(f"guess_window: sequences needs {missing}, [B] int64; pass it too")
        _check("sequences", sequences, window, 2)
        _check("generated", generated, window, 1)
        _check("starts", starts, window, 1)
        tensors += (sequences, generated, starts)
        columns = sequences.shape[1]
        end = columns if end is None else end
        if not 1 <= end <= columns:
            raise ValueError(f"guess_window: end must be from 1 to L = {columns}, not {end}")
        fewest = 1 if odds is None else 0
        for name, value, lowest in (("longest", longest, fewest), ("least", least, 1)):
            if value < lowest:
                raise ValueError(f"guess_window: {name} must be at least {lowest}, not {value}")
    elif latest is None:
        raise ValueError("guess_window: nothing to guess from; pass latest, sequences or both")
    if odds is not None:
        tensors += _check_odds(window, sequences, longest, odds, proposed, since)
    elif proposed is not None or since is not None:
        name = "since" if proposed is None else "proposed"
        raise ValueError(f"guess_window: {name} is kept with odds, which is None; pass it too")
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
        end or 0,
        odds,
        proposed,
        since,
    )


def _check_odds(
    window: Tensor,
    sequences: Tensor | None,
    longest: int,
    odds: Tensor,
    proposed: Tensor | None,
    since: Tensor | None,
) -> tuple[Tensor, ...]:
    rows, n = window.shape
    if sequences is None:
        raise ValueError(
            "guess_window: odds needs sequences, which tell what was right; pass it too"
        )
    if proposed is None or since is None:
        missing = f"proposed, [{rows}, 3, {n}]" if proposed is None else f"since, [{rows}]"
        raise ValueError(f"guess_window: odds needs {missing} int64; pass it too")
    named = {"odds": odds, "proposed": proposed, "since": since}
    wanted = {"odds": (rows, 2 + longest, 2), "proposed": (rows, 3, n), "since": (rows,)}
    for name, tensor in named.items():
        if tensor.shape != wanted[name]:
            raise ValueError(
                f"guess_window: {name} must be {list(wanted[name])}, not {shape_text(tensor)}"
            )
    check_int64("guess_window", ("window", window), **named)
    return odds, proposed, since


def _check(name: str, tensor: Tensor, window: Tensor, dims: int) -> None:
    shape = tensor.shape
    rows = window.shape[0]
    if len(shape) != dims or shape[0] != rows or shape[-1] < (dims == 2):
        of_rows = f"[{rows}], one entry per row of window"
        wanted = {"latest": f"[{rows}, V], V >= 1", "sequences": f"[{rows}, L], L >= 1"}
        raise ValueError(
            f"guess_window: {name} must be {wanted.get(name, of_rows)}, not {shape_text(tensor)}"
        )
    check_int64("guess_window", ("window", window), **{name: tensor})


LIBRARY.define(
    "guess_window(Tensor(a!) window, Tensor? latest, Tensor? sequences, Tensor? generated, "
    "Tensor? starts, int longest, int least, SymInt end, Tensor(b!)? odds, Tensor(c!)? proposed, "
    "Tensor(d!)? since) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(window: Tensor, *rest: Any) -> None:
    if len({kept is None for kept in rest[-3:]}) > 1:
        raise ValueError("guess_window: odds, proposed and since go together; pass all or none")
    OP.resolve(window.device)(window, *rest)


def _fake(window: Tensor, *_: Any) -> None:
    return None


LIBRARY.impl("guess_window", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::guess_window", _fake, lib=LIBRARY)
