"""What `decoder_layer` asks of its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm_kernels._common import dtype_text, shape_text
from cllm_kernels.decoder_layer.weights import DecoderWeights


def checked_scale(weights: DecoderWeights, eps: float, scale: float | None) -> float:
    """The scale that was given, or the usual one."""
    if scale is None:
        scale = weights.head_size**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"decoder_layer: scale must be finite, not {scale}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"decoder_layer: eps must be finite and not negative, not {eps}")
    return scale


def checked_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"decoder_layer: window must be at least 1 or None, not {window}")


def checked_rows(
    n: int, guesses_from: int | None, guess_width: int | None, gated_from: int | None
) -> tuple[int, int]:
    """`guesses_from` and `gated_from`, where None stands for them as well."""
    if guess_width is not None and guess_width < 1:
        raise ValueError(f"decoder_layer: guess_width must be at least 1, not {guess_width}")
    guesses = n if guesses_from is None else guesses_from
    gated = 0 if gated_from is None else gated_from
    for name, row in (("guesses_from", guesses), ("gated_from", gated)):
        if not 0 <= row <= n:
            raise ValueError(f"decoder_layer: {name} must be from 0 to n = {n}, not {row}")
    return guesses, gated


def refuse_gradients(weights: DecoderWeights, *others: Tensor) -> None:
    """Asks every tensor anew, as a weight may have been frozen or not since the last call."""
    for tensors in (others, weights.tensors):
        for tensor in tensors:
            if tensor.requires_grad:
                raise RuntimeError(
                    "decoder_layer has no gradient, but an argument requires one; "
                    "call it under torch.no_grad()"
                )


def fits(
    hidden: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
) -> bool:
    """Whether all tensors fit together; runs in every forward."""
    if hidden.dim() != 3 or k_cache.dim() != 4:
        return False
    batch, n, width = hidden.shape
    capacity = k_cache.shape[2]
    dtype, device = hidden.dtype, hidden.device
    return (
        (width == weights.hidden_size and weights.query.dtype is dtype and n <= capacity)
        and (cos.shape == (batch, n, weights.head_size) or cos.shape == (1, n, weights.head_size))
        and (k_cache.shape == (batch, weights.kv_heads, capacity, weights.head_size))
        and (v_cache.shape == k_cache.shape and sin.shape == cos.shape)
        and (lengths.shape == (batch,) and lengths.dtype is torch.int64)
        and (cos.dtype is dtype and sin.dtype is dtype)
        and (k_cache.dtype is dtype and v_cache.dtype is dtype)
        and (weights.query.device == device and cos.device == device and sin.device == device)
        and (k_cache.device == device and v_cache.device == device and lengths.device == device)
        and (k_cache.stride(3) == 1 and v_cache.stride(3) == 1 and hidden.is_contiguous())
        and (cos.is_contiguous() and sin.is_contiguous() and lengths.is_contiguous())
    )


def explain(
    hidden: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
) -> None:
    """Raises the error that names the first argument that does not fit."""
    width, size = weights.hidden_size, weights.head_size
    if hidden.dim() != 3 or hidden.shape[2] != width:
        raise ValueError(
            f"decoder_layer: hidden must be [B, n, {width}] to fit the weights, "
            f"not {shape_text(hidden)}"
        )
    batch, n, _ = hidden.shape
    capacity = k_cache.shape[2] if k_cache.dim() == 4 else 0
    cache = (batch, weights.kv_heads, capacity, size)
    rotary = (1 if cos.dim() == 3 and cos.shape[0] == 1 else batch, n, size)
    for name, tensor, wanted in (
        ("cos", cos, rotary),
        ("sin", sin, rotary),
        ("k_cache", k_cache, cache),
        ("v_cache", v_cache, cache),
        ("lengths", lengths, (batch,)),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"decoder_layer: {name} must be {list(wanted)} to fit hidden {shape_text(hidden)} "
                f"and the weights, not {shape_text(tensor)}"
            )
    if n > capacity:
        raise ValueError(
            f"decoder_layer: the {n} tokens of hidden {shape_text(hidden)} do not fit the "
            f"{capacity} slots of k_cache {shape_text(k_cache)}"
        )
    for name, tensor in (
        ("hidden", hidden),
        ("cos", cos),
        ("sin", sin),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("lengths", lengths),
    ):
        dtype = torch.int64 if name == "lengths" else weights.query.dtype
        if tensor.dtype is not dtype:
            raise TypeError(
                f"decoder_layer: {name} must be {dtype_text(dtype)}, not {dtype_text(tensor.dtype)}"
            )
        if tensor.device != weights.query.device:
            raise ValueError(
                f"decoder_layer: {name} is on {tensor.device} but the weights are on "
                f"{weights.query.device}"
            )
        if not (tensor.stride(-1) == 1 if name.endswith("cache") else tensor.is_contiguous()):
            what = "the last dimension of " if name.endswith("cache") else ""
            raise ValueError(
                f"decoder_layer: {what}{name} {shape_text(tensor)} must be contiguous, but its "
                f"strides are {list(tensor.stride())}"
            )


def no_room(lengths: Tensor, n: int, cache: Tensor, row: int) -> ValueError:
    return ValueError(
        f"decoder_layer: lengths[{row}] = {int(lengths[row])} and a block of {n} do not fit the "
        f"{cache.shape[2]} slots of k_cache {shape_text(cache)} (lengths {shape_text(lengths)})"
    )
