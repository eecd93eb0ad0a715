"""guess_window in Triton: one program per row, which searches the row's own text and no more."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of

COLUMNS = 1024  # of the text at a time
WARPS = 4


# A text grows from call to call: its width must not decide what is compiled.
@triton.jit(do_not_specialize=["width", "end"])
def guess_window_kernel(
    window_ptr,  # [B, n] int64, mutated
    latest_ptr,  # [B, vocabulary] int64, unread unless HAS_POOL
    sequences_ptr,  # [B, width] int64, unread where LONGEST is 0
    generated_ptr,  # [B] int64, unread where LONGEST is 0
    starts_ptr,  # [B] int64, unread where LONGEST is 0
    n,
    vocabulary,
    width,
    end,
    HAS_POOL: tl.constexpr,
    LONGEST: tl.constexpr,  # most tokens that are compared; 0: no text is searched
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # 64 bits: B * vocabulary and B * width may need them
    w_row = window_ptr + row * n
    found = row < 0
    if LONGEST > 0:
        text = sequences_ptr + row * width
        first = tl.maximum(tl.load(starts_ptr + row), 0)
        last = tl.minimum(tl.load(generated_ptr + row), end) - 1
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
            best = tl.maximum(best, tl.where(run > 0, run * width + column, -1))
        score = tl.max(best, axis=0)
        found = score >= LEAST * width.to(tl.int64)
        column = tl.maximum(score, 0) % width
        i = tl.arange(0, SLOTS)
        place = column + 1 + tl.maximum(i - 1, 0) % tl.maximum(last - column, 1)
        guessed = (i > 0) & (i < tl.where(found, n, 0))
        tl.store(w_row + i, tl.load(text + place, mask=guessed, other=0), mask=guessed)
    if HAS_POOL:
        pairs = latest_ptr + row * vocabulary
        token = tl.load(w_row)
        for slot in range(1, tl.where(found, 1, n)):
            # Warps go through the chain each at its own pace, and may see the token that a faster
            # one has stored here: where `own` counts, that is `own` itself.
            own = tl.load(w_row + slot)
            pair = tl.load(pairs + token, mask=(token >= 0) & (token < vocabulary), other=-1)
            token = tl.where(pair >= 0, pair % vocabulary, own)
            tl.store(w_row + slot, token)


def guess_window(
    window: Tensor,  # [B, n], mutated
    latest: Tensor | None,  # [B, V]
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
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
            n,
            0 if latest is None else latest.shape[1],
            0 if sequences is None else sequences.shape[1],
            end,
            HAS_POOL=latest is not None,
            LONGEST=0 if sequences is None else longest,
            LEAST=least,
            BLOCK=COLUMNS,
            SLOTS=triton.next_power_of_2(n),
            num_warps=WARPS,
            **chained(window),
            **FUSION,
        )
