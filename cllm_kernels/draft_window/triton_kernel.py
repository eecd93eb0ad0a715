"""draft_window in Triton: one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of

WARPS = 1


@triton.jit
def draft_window_kernel(
    window_ptr,  # [B, n] int64, written
    checked_ptr,  # [B, checked] int64
    guesses_ptr,  # [B, n] int64
    accepted_ptr,  # [B] int64
    generated_ptr,  # [B] int64, unread unless HAS_FILL
    progress_ptr,  # [B] int64, unread unless BLOCK_MODE
    fill_ptr,  # [B, fill_width] int64, unread unless HAS_FILL
    n,
    checked,
    fill_width,
    BLOCK_MODE: tl.constexpr,
    HAS_FILL: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SLOTS)
    inside = i < n
    own = checked_ptr + row * checked
    guesses = guesses_ptr + row * n
    if BLOCK_MODE:
        exact = tl.load(progress_ptr + row)
        guessed = inside & (i > tl.where(exact > 0, exact, n))
        mine = tl.load(own + i, mask=inside, other=0)
        token = tl.load(guesses + i - 1, mask=guessed, other=0)
        made = tl.where(guessed, token, mine)
    else:
        source = tl.maximum(tl.load(accepted_ptr + row) - 1 + i, 0)
        made = tl.load(guesses + tl.minimum(source, n - 1), mask=inside, other=0)
        if HAS_FILL:
            place = tl.maximum(tl.load(generated_ptr + row) - 1 + i, 0)
            unknown = inside & (source >= n)
            place = tl.minimum(place, fill_width - 1)
            token = tl.load(fill_ptr + row * fill_width + place, mask=unknown, other=0)
            made = tl.where(unknown, token, made)
        made = tl.where(i > 0, made, tl.load(own))
    tl.store(window_ptr + row * n + i, made, mask=inside)


def draft_window(
    window: Tensor,  # [B, n], written
    checked: Tensor,  # [B, v]
    guesses: Tensor,  # [B, n]
    accepted: Tensor,  # [B]
    generated: Tensor,  # [B]
    progress: Tensor | None,  # [B]
    fill: Tensor | None,  # [B, F]
) -> None:
    """Launches the kernel; nothing is read back."""
    rows, n = window.shape
    if rows == 0:
        return
    with device_of(window):
        draft_window_kernel[(rows,)](
            window,
            checked,
            guesses,
            accepted,
            generated,
            window if progress is None else progress,
            window if fill is None else fill,
            n,
            checked.shape[1],
            0 if fill is None else fill.shape[1],
            BLOCK_MODE=progress is not None,
            HAS_FILL=fill is not None,
            SLOTS=triton.next_power_of_2(n),
            num_warps=WARPS,
            **chained(window),
            **FUSION,
        )
