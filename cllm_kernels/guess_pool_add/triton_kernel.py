"""guess_pool_add in Triton: one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of


@triton.jit
def guess_pool_add_kernel(
    latest_ptr,  # [B, vocabulary] int64, mutated
    stamps_ptr,  # [B] int64, mutated
    window_ptr,  # [B, n] int64
    predictions_ptr,  # [B, n] int64
    n,
    vocabulary,
    SLOTS: tl.constexpr,  # n, padded to a power of two
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # 64 bits: B * vocabulary may need them
    i = tl.arange(0, SLOTS)
    token = tl.load(window_ptr + row * n + i, mask=i < n, other=-1)
    prediction = tl.load(predictions_ptr + row * n + i, mask=i < n, other=-1)
    inside = (token >= 0) & (token < vocabulary) & (prediction >= 0) & (prediction < vocabulary)
    stamp = tl.load(stamps_ptr + row)
    pair = (stamp + i) * vocabulary + prediction
    # a token may stand in the window twice; kernels behind this one see all of it
    tl.atomic_max(latest_ptr + row * vocabulary + token, pair, mask=inside, sem="relaxed")
    # Every warp has read the stamp before it is written.
    tl.debug_barrier()
    tl.store(stamps_ptr + row, stamp + n)


def guess_pool_add(
    latest: Tensor,  # [B, V], mutated
    stamps: Tensor,  # [B], mutated
    window: Tensor,  # [B, n]
    predictions: Tensor,  # [B, n]
) -> None:
    """Launches the kernel; nothing is read back."""
    rows, n = window.shape
    if rows == 0:
        return
    with device_of(window):
        guess_pool_add_kernel[(rows,)](
            latest,
            stamps,
            window,
            predictions,
            n,
            latest.shape[1],
            SLOTS=triton.next_power_of_2(n),
            num_warps=1 if n <= 256 else 4,
            **chained(window),
            **FUSION,
        )
