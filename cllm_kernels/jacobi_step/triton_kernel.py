"""jacobi_step in Triton: one program per row, the padded window in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of


@triton.jit
def jacobi_step_kernel(
    window_ptr,  # [B, n] int64, mutated
    predictions_ptr,  # [B, n] int64
    output_ptr,  # [B, capacity] int64, mutated
    lengths_ptr,  # [B] int64, mutated
    generated_ptr,  # [B] int64, mutated
    progress_ptr,  # [B] int64, mutated
    done_ptr,  # [B] uint8 (0 or 1), mutated
    limits_ptr,  # [B] int64
    stop_ids_ptr,  # [stops] int64
    fill_ptr,  # [B, fill_width] int64, unread unless HAS_FILL
    accepted_ptr,  # [B] int64, written
    n,
    capacity,
    stops,
    fill_width,
    BLOCK_MODE: tl.constexpr,
    ACCEPT_ONE: tl.constexpr,
    HAS_FILL: tl.constexpr,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SLOTS)
    real = i < n
    p_row = predictions_ptr + row * n
    w_row = window_ptr + row * n
    p = tl.load(p_row + i, mask=real, other=0)
    before = tl.load(p_row + i - 1, mask=real & (i > 0), other=0)  # p[i-1]
    w = tl.load(w_row + i, mask=real, other=0)
    m = tl.load(progress_ptr + row)
    generated = tl.load(generated_ptr + row)
    was_done = tl.load(done_ptr + row) != 0
    limit = tl.load(limits_ptr + row)
    room = limit - generated
    active = (limit > generated) & (was_done == 0)

    # The first guess behind m that the forward did not confirm ends the run: k is its slot.
    k = tl.min(tl.where(real & (i > m) & (w != before), i, n), axis=0).to(tl.int64)
    if ACCEPT_ONE:
        k = tl.minimum(k, m + 1)

    count = tl.minimum(k - m, room)
    finished = k - m >= room
    is_stop = i < 0
    for s in range(0, stops):
        is_stop = is_stop | (p == tl.load(stop_ids_ptr + s))
    first_stop = tl.min(tl.where(is_stop & (i >= m) & (i < m + count), i, n), axis=0).to(tl.int64)
    finished = finished | (first_stop < n)
    count = tl.where(first_stop < n, first_stop - m + 1, count)
    count = tl.where(active, count, 0)  # an idle row commits nothing and keeps its window
    total = generated + count

    tl.store(
        output_ptr + row * capacity + generated + i - m,
        p,
        mask=(i >= m) & (i < m + count),
    )

    # The new window is made of predictions and fill alone: nothing read here is rewritten.
    source = k - 1 + i
    shifted = tl.load(p_row + source, mask=source < n, other=0)
    if HAS_FILL:
        slot = tl.minimum(total - 1 + i, fill_width - 1)
        unknown = tl.load(fill_ptr + row * fill_width + slot, mask=real & (source >= n), other=0)
    else:
        unknown = tl.load(p_row + n - 1) + tl.zeros_like(p)
    shifted = tl.where(source < n, shifted, unknown)
    last_kept = tl.load(p_row + tl.maximum(m + count - 1, 0))
    if BLOCK_MODE:
        converged = k == n
        following = tl.where(converged, shifted, tl.where(i > m, before, w))
        next_progress = tl.where(converged, 0, k)
        cached = tl.where(converged, k, 0)
    else:
        following = shifted
        next_progress = m
        cached = k
    following = tl.where(finished, tl.where(i == 0, last_kept, w), following)
    next_progress = tl.where(finished, 0, next_progress)
    cached = tl.where(finished, m + count, cached)

    tl.store(w_row + i, following, mask=i < tl.where(active, n, 0))
    length = tl.load(lengths_ptr + row)
    # All of the row's state has been read before any of it is written.
    tl.debug_barrier()
    tl.store(lengths_ptr + row, length + cached, mask=active)
    tl.store(progress_ptr + row, next_progress, mask=active)
    tl.store(generated_ptr + row, total, mask=active)
    tl.store(done_ptr + row, ((active == 0) | finished).to(tl.uint8))
    tl.store(accepted_ptr + row, count)


def jacobi_step(
    window: Tensor,  # [B, n], mutated
    predictions: Tensor,  # [B, n]
    output: Tensor,  # [B, C], mutated
    lengths: Tensor,  # [B], mutated
    generated: Tensor,  # [B], mutated
    progress: Tensor,  # [B], mutated
    done: Tensor,  # [B] bool, mutated
    limits: Tensor,  # [B]
    stop_ids: Tensor,  # [S]
    fill: Tensor | None,  # [B, F]
    mode: str,
    accept: str,
) -> Tensor:
    """Launches the kernel; nothing is read back."""
    rows, n = window.shape
    accepted = torch.empty_like(lengths)
    if rows == 0:
        return accepted
    with device_of(window):
        jacobi_step_kernel[(rows,)](
            window,
            predictions,
            output,
            lengths,
            generated,
            progress,
            done.view(torch.uint8),
            limits,
            stop_ids,
            window if fill is None else fill,
            accepted,
            n,
            output.shape[1],
            stop_ids.shape[0],
            0 if fill is None else fill.shape[1],
            BLOCK_MODE=mode == "block",
            ACCEPT_ONE=accept == "one",
            HAS_FILL=fill is not None,
            SLOTS=triton.next_power_of_2(n),
            num_warps=1 if n <= 256 else 4,
            **chained(window),
            **FUSION,
        )
    return accepted
