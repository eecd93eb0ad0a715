"""guess_window in Triton: one program per row, which searches the row's own text and no more."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of
from cllm_kernels.guess_window import reference

GUESS = tl.constexpr(reference.GUESS)
MEMORY = tl.constexpr(reference.MEMORY)
COLUMNS = 1024  # of the text at a time
WARPS = 4


@triton.jit
def entry(
    values,  # [COUNT] int64
    place,
    COUNT: tl.constexpr,
):
    """One of the values."""
    return tl.sum(tl.where(tl.arange(0, COUNT) == place, values, 0), axis=0)


@triton.jit
def search(
    text,  # [width] int64
    first,
    last,
    width,
    taken,  # [WAYS] int64
    count,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,  # 0: nothing is taken yet
):
    """Score run * width + column of the latest column before `last` up to which most tokens are
    those up to `last`, and behind which none of the first `count` of `taken` stands; -1 where
    there is none."""
    best = tl.full((BLOCK,), -1, tl.int64)
    for base in range(first, last, BLOCK):
        column = base + tl.arange(0, BLOCK)
        alive = column < last
        run = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(LONGEST):
            # none of the masks hangs on a comparison, so that no load waits for another
            inside = (column < last) & (column - back >= first)
            key = tl.load(text + tl.maximum(last - back, 0))
            token = tl.load(text + column - back, mask=inside, other=0)
            alive = alive & inside & (token == key)
            run += alive.to(tl.int64)
        # the longest first, the latest of equals
        score = tl.where(run > 0, run * width + column, -1)
        if WAYS > 0:
            following = tl.load(text + column + 1, mask=column < last, other=0)
            for way in range(0, count):
                score = tl.where(following == entry(taken, way, WAYS), -1, score)
        best = tl.maximum(best, score)
    return tl.max(best, axis=0)


@triton.jit
def chain(
    made,  # [n] int64, from the second entry on stored to
    own,  # [n] int64; may be `made`
    pairs,  # [vocabulary] int64
    n,
    vocabulary,
):
    """Behind a window's first token the latest token behind each; where none is known its own."""
    token = tl.load(own)
    for slot in range(1, n):
        # Warps go through the chain each at its own pace, and may see the token that a faster
        # one has stored here: where `own` counts, that is `own` itself.
        mine = tl.load(own + slot)
        pair = tl.load(pairs + token, mask=(token >= 0) & (token < vocabulary), other=-1)
        token = tl.where(pair >= 0, pair % vocabulary, mine)
        tl.store(made + slot, token)


@triton.jit
def learn(
    made,  # [n] int64 one source's proposal behind its kind
    odds,  # [kinds, 2] int64, mutated
    truth,  # [known] int64
    known,
    n,
    kinds,
    SLOTS: tl.constexpr,
):
    """Counts for and against a proposal what the text has become since.

    The counts of one kind are read and written by scalars, which one thread stores for all: a call
    for another kind needs no barrier behind it.
    """
    i = tl.arange(0, SLOTS)
    kind = tl.load(made)
    guess = tl.load(made + 1 + i, mask=i < n - 1, other=0)
    token = tl.load(truth + i, mask=i < known, other=0)
    right = tl.min(tl.where((i < known) & (guess == token), SLOTS, i), axis=0).to(tl.int64)
    counts = (kind >= 0) & (kind < kinds) & (known > 0)
    place = odds + tl.where(counts, kind, 0) * 2
    good = tl.load(place) + right * GUESS
    bad = tl.load(place + 1) + tl.where(right < known, GUESS, 0)
    forget = good + bad > MEMORY
    good = tl.where(forget, good >> 1, good)
    bad = tl.where(forget, tl.maximum(bad >> 1, 1), bad)
    tl.debug_barrier()  # every warp has read them
    tl.store(place, good, mask=counts)
    tl.store(place + 1, bad, mask=counts)


@triton.jit
def propose(
    w_row,  # [n] int64
    text,  # [width] int64
    pairs,  # [vocabulary] int64
    odds,  # [kinds, 2] int64, mutated
    made,  # [3, n] int64, mutated
    since_ptr,  # [1] int64, mutated
    generated,
    end,
    kind,  # of the text's guesses, -1: it has none
    place,  # [SLOTS] int64 columns of them
    n,
    vocabulary,
    kinds,
    HAS_POOL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Learns from what a row has proposed, and proposes anew; behind it all threads see that."""
    i = tl.arange(0, SLOTS)
    pool = made + n
    looked_up = pool + n
    since = tl.load(since_ptr)
    known = tl.minimum(tl.minimum(generated, end) - since, n - 1)
    known = tl.where(since < 0, 0, known)
    truth = text + tl.maximum(since, 0)
    learn(made, odds, truth, known, n, kinds, SLOTS)
    learn(pool, odds, truth, known, n, kinds, SLOTS)
    learn(looked_up, odds, truth, known, n, kinds, SLOTS)
    tl.debug_barrier()  # what was proposed has been read, what was learnt is there
    tl.store(since_ptr, generated)
    inside = i < n
    mine = tl.load(w_row + i, mask=inside, other=0)
    tl.store(made + i, tl.where(i > 0, mine, 0), mask=inside)
    if HAS_POOL:
        tl.store(pool, 1)
        chain(pool, w_row, pairs, n, vocabulary)
    else:
        tl.store(pool + i, tl.where(i > 0, mine, -1), mask=inside)
    guessed = (i > 0) & (i < tl.where(kind >= 0, n, 0))
    mine = tl.where(guessed, tl.load(text + place, mask=guessed, other=0), mine)
    tl.store(looked_up + i, tl.where(i > 0, mine, kind), mask=inside)
    tl.debug_barrier()  # what was stored by other threads is read behind it


@triton.jit
def best_source(
    odds,  # [kinds, 2] int64
    kind,
    without,
    HAS_POOL: tl.constexpr,
):
    """Of own (0), pool (1) and text (2, whose guesses are of a kind, -1: it has none), but for
    `without`, the one with most right guesses to a wrong one, the last of equals; 3: none."""
    best = tl.where(without == 0, 3, 0)
    good = tl.load(odds)
    bad = tl.load(odds + 1)
    if HAS_POOL:
        its_good = tl.load(odds + 2)
        its_bad = tl.load(odds + 3)
        better = (without != 1) & ((best == 3) | (its_good * bad >= good * its_bad))
        best = tl.where(better, 1, best)
        good = tl.where(better, its_good, good)
        bad = tl.where(better, its_bad, bad)
    there = (kind >= 0) & (without != 2)
    its_good = tl.load(odds + 2 * kind, mask=there, other=0)
    its_bad = tl.load(odds + 2 * kind + 1, mask=there, other=0)
    better = there & ((best == 3) | (its_good * bad >= good * its_bad))
    return tl.where(better, 2, best)


# A text grows from call to call: its width must not decide what is compiled.
@triton.jit(do_not_specialize=["width", "end"])
def guess_window_kernel(
    window_ptr,  # [B, n] int64, mutated
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
    HAS_POOL: tl.constexpr,
    LONGEST: tl.constexpr,  # most tokens that are compared; 0: no text is searched
    LEAST: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # 64 bits: B * vocabulary and B * width may need them
    w_row = window_ptr + row * n
    text = sequences_ptr + row * width
    pairs = latest_ptr + row * vocabulary
    i = tl.arange(0, SLOTS)
    score = row - row - 1
    place = i + score
    if LONGEST > 0:
        first = tl.maximum(tl.load(starts_ptr + row), 0)
        last = tl.minimum(tl.load(generated_ptr + row), end) - 1
        score = search(text, first, last, width.to(tl.int64), 0, 0, LONGEST, BLOCK, 0)
        column = tl.maximum(score, 0) % width
        place = column + 1 + tl.maximum(i - 1, 0) % tl.maximum(last - column, 1)
    found = score >= LEAST * width.to(tl.int64)
    if WEIGHED:
        kinds = 2 + LONGEST
        odds = odds_ptr + row * kinds * 2
        made = proposed_ptr + row * 3 * n
        generated = tl.load(generated_ptr + row)
        kind = tl.where(found, 1 + score // width, -1)
        propose(
            w_row,
            text,
            pairs,
            odds,
            made,
            since_ptr + row,
            generated,
            end,
            kind,
            place,
            n,
            vocabulary,
            kinds,
            HAS_POOL,
            SLOTS,
        )
        best = best_source(odds, kind, 3, HAS_POOL)
        guessed = (i > 0) & (i < n)
        tl.store(w_row + i, tl.load(made + best * n + i, mask=guessed, other=0), mask=guessed)
    else:
        guessed = (i > 0) & (i < tl.where(found, n, 0))
        if LONGEST > 0:
            tl.store(w_row + i, tl.load(text + place, mask=guessed, other=0), mask=guessed)
        if HAS_POOL:
            chain(w_row, w_row, pairs, tl.where(found, 1, n), vocabulary)


def guess_window(
    window: Tensor,  # [B, n], mutated
    latest: Tensor | None,  # [B, V]
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
    odds: Tensor | None,  # [B, 2 + longest, 2], mutated
    proposed: Tensor | None,  # [B, 3, n], mutated
    since: Tensor | None,  # [B], mutated
) -> None:
    """Launches the kernel; nothing is read back."""
    rows, n = window.shape
    if rows == 0 or n == 1:
        return
    with device_of(window):
        guess_window_kernel[(rows,)](
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
            HAS_POOL=latest is not None,
            LONGEST=0 if sequences is None else longest,
            LEAST=least,
            WEIGHED=odds is not None,
            BLOCK=COLUMNS,
            SLOTS=triton.next_power_of_2(n),
            num_warps=WARPS,
            **chained(window),
            **FUSION,
        )
