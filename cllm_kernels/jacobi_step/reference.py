"""jacobi_step in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """One step for all rows at once; no loop over rows and nothing read back to the host."""
    n = window.shape[1]
    slot = torch.arange(n, device=window.device)  # [n]
    last = predictions[:, -1:]  # [B, 1]
    m = progress[:, None]  # [B, 1]

    # 1. A guess w[i] is confirmed if it is what the forward predicted for its place, p[i-1].
    #    Guesses up to m were committed before. k counts the leading run, and p[0], always right.
    confirmed = (window[:, 1:] == predictions[:, :-1]) | (slot[1:] <= m)  # [B, n-1]
    k = 1 + confirmed.long().cumprod(dim=1).sum(dim=1, keepdim=True)  # [B, 1]
    if accept == "one":
        k = torch.minimum(k, m + 1)

    # 2. Of the new tokens p[m..k-1] keep those within the row's limit, and up to the first stop.
    room = limits[:, None] - generated[:, None]
    exhausted = room <= 0
    count = torch.minimum(k - m, room)
    at_limit = k - m >= room
    is_stop = (predictions[:, :, None] == stop_ids).any(dim=-1)  # [B, n]
    is_stop &= (slot >= m) & (slot < m + count)
    stopped = is_stop.any(dim=1, keepdim=True)
    count = torch.where(stopped, is_stop.long().argmax(dim=1, keepdim=True) - m + 1, count)
    active = ~done[:, None] & ~exhausted
    count = torch.where(active, count, 0)
    finished = active & (at_limit | stopped)

    # 3. Commit them behind what the row has generated.
    offset = torch.arange(output.shape[1], device=output.device) - generated[:, None]  # [B, C]
    committed = predictions.gather(1, (offset + m).clamp(0, n - 1))
    output.copy_(torch.where((offset >= 0) & (offset < count), committed, output))
    total = generated[:, None] + count

    # 4. The next window, and how much of this one stays in the KV cache.
    if fill is None:
        unknown = last.expand(-1, n)
    else:
        unknown = fill.gather(1, (total - 1 + slot).clamp(0, fill.shape[1] - 1))
    source = k - 1 + slot  # [B, n]
    leftover = predictions.gather(1, source.clamp(0, n - 1))
    shifted = torch.where(source < n, leftover, unknown)
    if mode == "sliding":
        next_window, next_progress, cached = shifted, m, k
    else:
        shorter = torch.cat([window[:, :1], predictions[:, :-1]], dim=1)  # p[i-1] in place i
        refined = torch.where(slot > m, shorter, window)
        converged = k == n
        next_window = torch.where(converged, shifted, refined)
        next_progress = torch.where(converged, 0, k)
        cached = torch.where(converged, k, 0)
    last_kept = predictions.gather(1, (m + count - 1).clamp(0, n - 1))
    ended = torch.where(slot == 0, last_kept, window)
    next_window = torch.where(finished, ended, next_window)
    next_progress = torch.where(finished, 0, next_progress)
    cached = torch.where(finished, m + count, cached)

    window.copy_(torch.where(active, next_window, window))
    progress.copy_(torch.where(active, next_progress, m)[:, 0])
    lengths.add_(torch.where(active, cached, 0)[:, 0])
    generated.copy_(total[:, 0])
    done.logical_or_((exhausted | finished)[:, 0])
    return count[:, 0].clone()
