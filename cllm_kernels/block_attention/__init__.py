"""block_attention: append a block to a ragged KV cache and attend to both, in one op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import (
    FLOAT_DTYPES,
    LIBRARY,
    dtype_text,
    eager,
    shape_text,
    without_autocast,
)

LARGEST_HEAD = 256


def _reference() -> Any:
    from cllm_kernels.block_attention import reference

    return _bounded(without_autocast(reference.block_attention))


def _cpp() -> Any:
    from cllm_kernels.block_attention import native

    return without_autocast(native.block_attention_cpu)


def _triton() -> Any:
    from cllm_kernels.block_attention import triton_kernel

    return _bounded(triton_kernel.block_attention)


OP = register(
    Op(
        name="block_attention",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def block_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Attention of n queries per row to a KV cache in which every row has its own length.

    Row b's keys and values stand at slots 0 .. lengths[b] - 1 of its cache. Token i of the block
    stands at position lengths[b] + i: its key and value are written to that slot, and its query
    attends to the cached slots and to the block's tokens 0 .. i. `lengths` stays as it is, so a
    block that turns out wrong is dropped by not advancing it. Slots that no query of the block
    sees are never read into a result: they may hold anything, NaN included.

    out = softmax(softcap * tanh(scale * q k^T / softcap)) v, scores, softmax and sums in fp32
    (soft-cap: Gemma 2, Gemma Team 2024, section 2; the sums are taken online, FlashAttention,
    Dao et al. 2022, and split over long caches, Flash-Decoding, Dao et al. 2023).

    What a query gets is made of slots in a fixed order and grouping, which depend on the sizes
    below and not on any row's length: so its bits are the same wherever its block begins.

    Args (B rows, Hq query heads, Hkv key and value heads, Hq a multiple of Hkv, head size D):
        q: [B, Hq, n, D] float32, bfloat16 or float16, 1 <= D <= 256; head h reads KV head
            h // (Hq // Hkv).
        k_new, v_new: [B, Hkv, n, D] of the same dtype and device.
        k_cache, v_cache: [B, Hkv, C, D], n <= C, mutated in place. Any strides, so that a view such
            as storage.transpose(1, 2) serves, as long as the last dimension is contiguous.
        lengths: [B] int64, contiguous; lengths[b] + n <= C.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: None, or the number of positions a query sees, its own included (sliding window).
        softcap: None, or a positive number.
        max_length: None, or the most that lengths + n comes to, as far as the caller knows. The
            Triton kernel chooses by it how to split the cache (by C otherwise); a caller whose
            cache grows passes one number throughout. Results are right whatever it is.

    Returns:
        [B, Hq, n, D], the transposed view of a contiguous [B, n, Hq, D].

    Raises:
        ValueError: shapes, strides, devices or options that do not fit, or, on the CPU, a row whose
            block does not fit its cache. On a GPU that is not looked at, because it would wait for
            the device: a length is taken as clamped to 0 .. C, and tokens whose slot lies beyond
            the cache take part in the attention but are not stored.
        TypeError: a wrong dtype. RuntimeError: gradients were asked for; there are none.
        BackendError: see `use_backend`.
    """
    if not _fits(q, k_new, v_new, k_cache, v_cache, lengths):
        _explain(q, k_new, v_new, k_cache, v_cache, lengths)
    if scale is None:
        scale = q.shape[3] ** -0.5
    _check_options(scale, window, softcap, max_length)
    if torch.is_grad_enabled() and (
        (q.requires_grad or k_new.requires_grad or v_new.requires_grad)
        or (k_cache.requires_grad or v_cache.requires_grad)
    ):
        raise RuntimeError(
            "block_attention has no gradient, but an argument requires one; "
            "call it under torch.no_grad()"
        )
    tensors = (q, k_new, v_new, k_cache, v_cache, lengths)
    if eager(*tensors) and not (
        (q.is_neg() or k_new.is_neg() or v_new.is_neg()) or k_cache.is_neg() or v_cache.is_neg()
    ):
        attend = OP.resolve(q.device)
    else:
        attend = torch.ops.cllm_kernels.block_attention.default
    return attend(*tensors, scale, window, softcap, max_length)


def _fits(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> bool:
    """Whether all tensors fit together; runs in every layer of every forward."""
    if q.dim() != 4 or k_new.dim() != 4 or k_cache.dim() != 4:
        return False
    batch, heads, n, width = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    dtype, device = q.dtype, q.device
    return (
        (kv_heads >= 1 and heads % kv_heads == 0 and 1 <= width <= LARGEST_HEAD)
        and (k_new.shape == (batch, kv_heads, n, width) and v_new.shape == k_new.shape)
        and (k_cache.shape == (batch, kv_heads, capacity, width) and n <= capacity)
        and (v_cache.shape == k_cache.shape and lengths.shape == (batch,))
        and (dtype in FLOAT_DTYPES and k_new.dtype is dtype and v_new.dtype is dtype)
        and (k_cache.dtype is dtype and v_cache.dtype is dtype and lengths.dtype is torch.int64)
        and (k_new.device == device and v_new.device == device and lengths.device == device)
        and (k_cache.device == device and v_cache.device == device and lengths.is_contiguous())
        and (k_cache.stride(3) == 1 and v_cache.stride(3) == 1)
    )


def _explain(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> None:
    """Raises the error that names the first argument that does not fit."""
    if q.dim() != 4 or not 1 <= q.shape[3] <= LARGEST_HEAD:
        raise ValueError(
            f"block_attention: q must be [B, Hq, n, D] with 1 <= D <= {LARGEST_HEAD}, "
            f"not {shape_text(q)}"
        )
    batch, heads, n, width = q.shape
    if k_cache.dim() != 4 or (k_cache.shape[0], k_cache.shape[3]) != (batch, width):
        raise ValueError(
            f"block_attention: k_cache must be [{batch}, Hkv, C, {width}] to fit q "
            f"{shape_text(q)}, not {shape_text(k_cache)}"
        )
    kv_heads, capacity = k_cache.shape[1:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"block_attention: q {shape_text(q)} has {heads} heads, which is not a multiple of the "
            f"{kv_heads} of k_cache {shape_text(k_cache)}"
        )
    if n > capacity:
        raise ValueError(
            f"block_attention: the {n} tokens of q {shape_text(q)} do not fit the {capacity} slots "
            f"of k_cache {shape_text(k_cache)}"
        )
    block, cache = (batch, kv_heads, n, width), tuple(k_cache.shape)
    for name, tensor, wanted in (
        ("k_new", k_new, block),
        ("v_new", v_new, block),
        ("v_cache", v_cache, cache),
        ("lengths", lengths, (batch,)),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"block_attention: {name} must be {list(wanted)} to fit q {shape_text(q)} and "
                f"k_cache {shape_text(k_cache)}, not {shape_text(tensor)}"
            )
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"block_attention: q must be float32, bfloat16 or float16, not {dtype_text(q.dtype)}"
        )
    for name, tensor in (
        ("k_new", k_new),
        ("v_new", v_new),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("lengths", lengths),
    ):
        dtype = torch.int64 if name == "lengths" else q.dtype
        if tensor.dtype is not dtype:
            raise TypeError(
                f"block_attention: {name} must be {dtype_text(dtype)}, "
                f"not {dtype_text(tensor.dtype)}"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"block_attention: {name} is on {tensor.device} but q is on {q.device}"
            )
        if name.endswith("cache") and tensor.stride(3) != 1:
            raise ValueError(
                f"block_attention: the last dimension of {name} {shape_text(tensor)} must be "
                f"contiguous, but its strides are {list(tensor.stride())}"
            )
    if not lengths.is_contiguous():
        raise ValueError("block_attention: lengths must be contiguous; pass lengths.contiguous()")


def _check_options(
    scale: float, window: int | None, softcap: float | None, max_length: int | None
) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"block_attention: scale must be a finite number or None, not {scale}")
    if window is not None and window < 1:
        raise ValueError(f"block_attention: window must be at least 1 or None, not {window}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(
            f"block_attention: softcap must be a positive number or None, not {softcap}"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"block_attention: max_length must be at least 1 or None, not {max_length}"
        )


def check_room(lengths: Tensor, n: int, cache: Tensor) -> None:
    """Raises ValueError for the first of `lengths` [B], on the CPU, whose block does not fit."""
    wrong = (lengths < 0) | (lengths > cache.shape[2] - n)
    if bool(wrong.any()):
        raise no_room(lengths, n, cache, int(wrong.long().argmax()))


def no_room(lengths: Tensor, n: int, cache: Tensor, row: int) -> ValueError:
    return ValueError(
        f"block_attention: lengths[{row}] = {int(lengths[row])} and a block of {n} do not fit the "
        f"{cache.shape[2]} slots of k_cache {shape_text(cache)} (lengths {shape_text(lengths)})"
    )


def _bounded(attend: Any) -> Any:
    """`attend` with the check of `lengths` that the C++ backend makes itself."""

    def checked(q: Tensor, *rest: Any) -> Tensor:
        if q.device.type == "cpu":
            check_room(rest[4], q.shape[2], rest[2])
        return attend(q, *rest)

    return checked


LIBRARY.define(
    "block_attention(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor lengths, float scale, int? window, float? softcap, "
    "int? max_length) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(q: Tensor, *rest: Any) -> Tensor:
    return OP.resolve(q.device)(q, *rest)


def empty_output(q: Tensor) -> Tensor:
    """[B, Hq, n, D] over contiguous [B, n, Hq, D]: what the projection behind attention reads."""
    batch, heads, n, width = q.shape
    return torch.empty((batch, n, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)


def _fake(q: Tensor, *_: Any) -> Tensor:
    return empty_output(q)


LIBRARY.impl("block_attention", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::block_attention", _fake, lib=LIBRARY)
