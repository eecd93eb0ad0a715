"""guess_candidates in Triton: one program per row, which searches the row's own text once a way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of
from cllm_kernels.guess_candidates import reference
from cllm_kernels.guess_window.triton_kernel import (
    best_source,
    chain,
    entry,
    propose,
    search,
)

USABLE = tl.constexpr(reference.USABLE)
SHORT = tl.constexpr(reference.SHORT)
NONE = tl.constexpr(reference.NONE)
COLUMNS = 512  # of the text at a time: with more a thread, registers do not suffice
WARPS = 8


# A text grows from call to call: its width must not decide what is compiled.
@triton.jit(do_not_specialize=["width", "end"])
def guess_candidates_kernel(
    windows_ptr,  # [B, COUNT, n] int64, written
    window_ptr,  # [B, n] int64
    latest_ptr,  # [B, vocabulary] int64, unread unless HAS_POOL
    sequences_ptr,  # [B, width] int64, unread where LONGEST is 0 and not WEIGHED; so are the next
    generated_ptr,  # [B] int64
    starts_ptr,  # [B] int64
    odds_ptr,  # [B, 2 + LONGEST, 2] int64, mutated where WEIGHED; so are the next
    proposed_ptr,  # [B, 3, n] int64
    since_ptr,  # [B] int64
    n,
    vocabulary,
    width,
    end,
    COUNT: tl.constexpr,
    OWN_SECOND: tl.constexpr,
    HAS_POOL: tl.constexpr,
    LONGEST: tl.constexpr,  # most tokens that are compared; 0: no text is searched
    LEAST: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    SOURCES: tl.constexpr,  # COUNT + 2, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # 64 bits: B * vocabulary and B * width may need them
    w_row = window_ptr + row * n
    text = sequences_ptr + row * width
    pairs = latest_ptr + row * vocabulary
    made = proposed_ptr + row * 3 * n
    out = windows_ptr + row * COUNT * n
    columns = width.to(tl.int64)
    i = tl.arange(0, SLOTS)
    inside = i < n
    mine = tl.load(w_row + i, mask=inside, other=0)

    # sources: the ways of the text, from 0 on, then the pool and the window's own
    source = tl.arange(0, SOURCES).to(tl.int64)
    POOL: tl.constexpr = COUNT
    OWN: tl.constexpr = COUNT + 1
    begun = tl.zeros((SOURCES,), tl.int64)  # first guesses
    column = tl.zeros((SOURCES,), tl.int64)  # of the text that a way is behind
    rank = tl.where(source == OWN, USABLE, NONE)
    last = row - row
    kind = last - 1
    if LONGEST > 0:
        first = tl.maximum(tl.load(starts_ptr + row), 0)
        last = tl.minimum(tl.load(generated_ptr + row), end) - 1
        until = last
        for way in range(0, COUNT):
            score = search(text, first, until, columns, begun, way, LONGEST, BLOCK, SOURCES)
            found = score >= 0
            enough = score >= LEAST * columns
            # Ways behind one that is short are short, and taken where pool and window's own leave
            # room; behind one that is none there are no others.
            room = way + 1 < COUNT - 1 - HAS_POOL
            until = tl.where(enough | (found & room), last, first)
            its = tl.maximum(score, 0) % columns
            token = tl.load(text + its + 1, mask=found, other=0)
            here = (source == way) & found
            column = tl.where(here, its, column)
            begun = tl.where(here, token, begun)
            rank = tl.where(here, tl.where(enough, USABLE, SHORT), rank)
            kind = tl.where((way == 0) & enough, 1 + score // columns, kind)

    place = source  # in the order of taking
    if WEIGHED:
        kinds = 2 + LONGEST
        odds = odds_ptr + row * kinds * 2
        its = entry(column, 0, SOURCES)
        propose(
            w_row,
            text,
            pairs,
            odds,
            made,
            since_ptr + row,
            tl.load(generated_ptr + row),
            end,
            kind,
            its + 1 + tl.maximum(i - 1, 0) % tl.maximum(last - its, 1),
            n,
            vocabulary,
            kinds,
            HAS_POOL,
            SLOTS,
        )
        best = best_source(odds, kind, 3, HAS_POOL)
        second = best_source(odds, kind, best, HAS_POOL)
        which = tl.where(source == OWN, 0, tl.where(source == POOL, 1, tl.where(source == 0, 2, 4)))
        place = tl.where(which == 4, source + 2, 2)
        place = tl.where(which == second, 1, place)
        place = tl.where(which == best, 0, place)
    if HAS_POOL:
        token = tl.load(w_row)
        known = (token >= 0) & (token < vocabulary)
        pair = tl.load(pairs + token, mask=known, other=-1)
        token = tl.where(pair >= 0, pair % vocabulary, tl.load(w_row + 1))
        begun = tl.where(source == POOL, token, begun)
        rank = tl.where(source == POOL, USABLE, rank)
    begun = tl.where(source == OWN, tl.load(w_row + 1), begun)

    key = 2 * place
    if OWN_SECOND:
        ahead = tl.min(tl.where(rank == USABLE, key, 2 * SOURCES + 8), axis=0)
        key = tl.where(source == OWN, tl.minimum(key, ahead + 1), key)
    earlier = (rank[None, :] == USABLE) & (rank[:, None] == USABLE) & (key[None, :] < key[:, None])
    same = tl.max(((begun[:, None] == begun[None, :]) & earlier).to(tl.int64), axis=1)
    if OWN_SECOND:
        same = tl.where(source == OWN, 0, same)
    # usable ones that begin as none before, then those that do, then those of a lesser rank
    order = (rank + same) * (2 * SOURCES + 8) + key
    number = tl.sum((order[None, :] < order[:, None]).to(tl.int64), axis=1)
    number = tl.where(rank == NONE, COUNT, number)  # of the candidate; none from COUNT on
    there = tl.sum((rank != NONE).to(tl.int32), axis=0)

    begins = i == 0
    for way in range(0, COUNT):
        if LONGEST > 0:
            to = entry(number, way, SOURCES)
            its = entry(column, way, SOURCES)
            behind = its + 1 + tl.maximum(i - 1, 0) % tl.maximum(last - its, 1)
            taken = i < tl.where(to < COUNT, n, 0)
            tokens = tl.load(text + behind, mask=taken, other=0)
            tl.store(out + to * n + i, tl.where(begins, mine, tokens), mask=taken)
    if HAS_POOL:
        to = entry(number, POOL, SOURCES)
        if WEIGHED:
            taken = i < tl.where(to < COUNT, n, 0)
            tokens = tl.load(made + n + i, mask=taken, other=0)
            tl.store(out + to * n + i, tl.where(begins, mine, tokens), mask=taken)
        else:
            tl.store(out + to * n, tl.load(w_row), mask=to < COUNT)
            chain(out + to * n, w_row, pairs, tl.where(to < COUNT, n, 1), vocabulary)
    to = entry(number, OWN, SOURCES)
    tl.store(out + to * n + i, mine, mask=i < tl.where(to < COUNT, n, 0))
    for more in range(0, COUNT):  # copies where they are too few
        short = i < tl.where(more >= there, n, 0)
        tl.store(out + more * n + i, mine, mask=short)


def guess_candidates(
    window: Tensor,  # [B, n]
    count: int,
    latest: Tensor | None,  # [B, V]
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
    own_second: bool,
    odds: Tensor | None,  # [B, 2 + longest, 2], mutated
    proposed: Tensor | None,  # [B, 3, n], mutated
    since: Tensor | None,  # [B], mutated
) -> Tensor:  # [B, count, n]
    """Launches the kernel; nothing is read back."""
    rows, n = window.shape
    if rows == 0 or n == 1:
        return window[:, None].repeat(1, count, 1)
    windows = window.new_empty(rows, count, n)
    with device_of(window):
        guess_candidates_kernel[(rows,)](
            windows,
            window,
            window if latest is None else latest,
            window if sequences is None else sequences,
            window if generated is None else generated,
            window if starts is None else starts,
            window if odds is None else odds,
            window if proposed is None else proposed,
            window if since is None else since,
            n,
            0 if latest is None else latest.shape[1],
            0 if sequences is None else sequences.shape[1],
            end,
            COUNT=count,
            OWN_SECOND=own_second,
            HAS_POOL=latest is not None,
            LONGEST=0 if sequences is None else longest,
            LEAST=least,
            WEIGHED=odds is not None,
            BLOCK=COLUMNS,
            SLOTS=triton.next_power_of_2(n),
            SOURCES=triton.next_power_of_2(count + 2),
            num_warps=WARPS,
            **chained(window),
            **FUSION,
        )
    return windows
