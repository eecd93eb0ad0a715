"""guess_candidates in C++: addresses and sizes handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._native import native_module

_C = native_module()


def guess_candidates_cpu(
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
    """The C++ kernel."""
    rows, n = window.shape
    windows = window.new_empty(rows, count, n)
    _C.guess_candidates_cpu(
        windows.data_ptr(),
        count,
        own_second,
        window.data_ptr(),
        0 if latest is None else latest.data_ptr(),
        0 if sequences is None else sequences.data_ptr(),
        0 if generated is None else generated.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        rows,
        n,
        0 if latest is None else latest.shape[1],
        0 if sequences is None else sequences.shape[1],
        longest,
        least,
        end,
        0 if odds is None else odds.data_ptr(),
        0 if proposed is None else proposed.data_ptr(),
        0 if since is None else since.data_ptr(),
        torch.get_num_threads(),
    )
    return windows
