"""guess_candidates: several windows for the same places, from all that there is to guess from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, eager
from cllm_kernels.guess_window.arguments import check_sources, kept_together

# A GPU's program compares all sources with each other, which registers bound.
MOST = 32


def _reference() -> Any:
    from cllm_kernels.guess_candidates import reference

    return reference.guess_candidates


def _cpp() -> Any:
    from cllm_kernels.guess_candidates import native

    return native.guess_candidates_cpu


def _triton() -> Any:
    from cllm_kernels.guess_candidates import triton_kernel

    return triton_kernel.guess_candidates


OP = register(
    Op(
        name="guess_candidates",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def guess_candidates(
    window: Tensor,
    count: int,
    latest: Tensor | None = None,
    sequences: Tensor | None = None,
    generated: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    longest: int = 3,
    least: int = 1,
    end: int | None = None,
    own_second: bool = False,
    odds: Tensor | None = None,
    proposed: Tensor | None = None,
    since: Tensor | None = None,
) -> Tensor:
    """Windows that begin with the first token of every row's window and go on in different ways,
    for one forward to check as a tree (SpecInfer, Miao et al. 2024, arXiv 2305.09781).

    What is guessed from is `guess_window`'s: the text, the pool, and the window's own guesses. The
    text goes on in up to `count` ways: the next way is what followed the latest of the longest
    occurrences of its end behind which another token stands than in the ways before. The ways come
    first, then the pool's chain, then the window's own; with `odds` the first way, the chain and
    the window's own come by how often their kinds were right, the best first, and the other ways
    behind them. So the first of these sources is what `guess_window` would take, and what it
    counts and keeps is kept likewise.

    The candidates are the first sources whose first guesses differ, in this order. Where they are
    too few, the sources left over follow, then ways of which fewer tokens than `least` stood
    before, and in the end copies of the window.

    Args (int64, contiguous, on one device; B rows):
        window: [B, n]; it is not changed.
        count: C, from 1 to `MOST`.
        own_second: the window's own guesses, if they are not the first candidate, are the second,
            whatever they begin with.
        others: as `guess_window` has them.

    Returns:
        [B, C, n] int64.

    Raises:
        ValueError: a shape, layout, device or number that does not fit, or nothing to guess from.
        TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    sources = (latest, sequences, generated, starts)
    tensors, end = check_sources(
        "guess_candidates", window, *sources, longest, least, end, odds, proposed, since
    )
    if not 1 <= count <= MOST:
        raise ValueError(f"guess_candidates: count must be from 1 to {MOST}, not {count}")
    guess = (
        OP.resolve(window.device)
        if eager(*tensors)
        else torch.ops.cllm_kernels.guess_candidates.default
    )
    kept = (odds, proposed, since)
    found: Tensor = guess(window, count, *sources, longest, least, end, own_second, *kept)
    return found


LIBRARY.define(
    "guess_candidates(Tensor window, SymInt count, Tensor? latest, Tensor? sequences, "
    "Tensor? generated, Tensor? starts, int longest, int least, SymInt end, bool own_second, "
    "Tensor(a!)? odds, Tensor(b!)? proposed, Tensor(c!)? since) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(window: Tensor, *rest: Any) -> Tensor:
    kept_together("guess_candidates", *rest[-3:])
    found: Tensor = OP.resolve(window.device)(window, *rest)
    return found


def _fake(window: Tensor, count: int, *_: Any) -> Tensor:
    rows, n = window.shape
    return window.new_empty(rows, count, n)


LIBRARY.impl("guess_candidates", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::guess_candidates", _fake, lib=LIBRARY)
