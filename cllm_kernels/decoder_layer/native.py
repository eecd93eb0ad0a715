"""decoder_layer in C++: addresses, sizes and strides handed to _C."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module
from cllm_kernels.decoder_layer.checks import no_room
from cllm_kernels.decoder_layer.weights import DecoderWeights

_C = native_module()


def decoder_layer_cpu(
    hidden: Tensor,  # [B, n, H]
    weights: DecoderWeights,
    cos: Tensor,  # [B or 1, n, D]
    sin: Tensor,  # [B or 1, n, D]
    k_cache: Tensor,  # [B, Hkv, C, D], mutated
    v_cache: Tensor,  # [B, Hkv, C, D], mutated
    lengths: Tensor,  # [B]
    scale: float,
    eps: float,
    window: int | None,
    guesses_from: int,
    guess_width: int | None,
    gated_from: int,
) -> Tensor:
    """[B, n, H]. Raises ValueError, naming the row, if a block does not fit its cache."""
    batch, n, width = hidden.shape
    out = torch.empty_like(hidden)
    size = weights.head_size
    row = _C.decoder_layer_cpu(
        (
            hidden.data_ptr(),
            out.data_ptr(),
            *weights.addresses,
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            lengths.data_ptr(),
        ),
        weights.ranks,
        DTYPE_CODES[hidden.dtype],
        (
            batch,
            n,
            width,
            weights.gate.shape[0],
            weights.heads,
            weights.kv_heads,
            size,
            k_cache.shape[2],
            n * size if cos.shape[0] == batch else 0,
            window or 0,
            guesses_from,
            guess_width or max(1, n - guesses_from),
            gated_from,
        ),
        (*k_cache.stride()[:3], *v_cache.stride()[:3]),
        scale,
        eps,
        torch.get_num_threads(),
    )
    if row >= 0:
        raise no_room(lengths, n, k_cache, row)
    return out
