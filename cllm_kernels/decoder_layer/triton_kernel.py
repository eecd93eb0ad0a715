"""decoder_layer on a GPU, in seven launches where torch needs some forty: four for the products of
few rows (`block_linear`, which turns heads, adds residuals and does SwiGLU as well), two norms, and
`block_attention`. Where rows are many or heads have norms, products and the steps behind them are
launches of their own. So they are where an adapter changes what the products give: four more that
add its terms (`triton_low_rank`), and one that turns heads.

Where a block holds several chains of tokens, one launch attends to all of them: the programs of a
chain load the cache in front of the block and its own tokens from where they come, so none ever
loads what it must not see.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of
from cllm_kernels.block_attention.triton_kernel import block_attention
from cllm_kernels.block_attention.triton_sizes import Chains
from cllm_kernels.block_linear.triton_kernel import (
    few_rows,
    silu_mul,
    takes,
    turned,
    turns,
)
from cllm_kernels.decoder_layer.triton_low_rank import Terms, expand, gather
from cllm_kernels.decoder_layer.weights import DecoderWeights
from cllm_kernels.rms_norm.triton_kernel import rms_norm

_GATED_BLOCK = 1024  # elements of a program of `silu_mul_kernel`


@triton.jit
def rotary_kernel(
    q_ptr,  # [tokens, heads * D], turned in place
    k_ptr,  # [tokens, kv_heads * D], turned in place
    cos_ptr,  # [tokens or n, D]
    sin_ptr,  # [tokens or n, D]
    q_norm_ptr,  # [D], read where HAS_NORM
    k_norm_ptr,  # [D], read where HAS_NORM
    heads,
    kv_heads,
    places,  # rows of cos and sin
    eps,
    HALF: tl.constexpr,  # D / 2
    BLOCK: tl.constexpr,  # HALF, padded to a power of two
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    real = column < HALF
    kind = q_ptr.dtype.element_ty
    if head < heads:
        base = q_ptr + (token * heads + head) * (2 * HALF)
        norm_ptr = q_norm_ptr
    else:
        base = k_ptr + (token * kv_heads + head - heads) * (2 * HALF)
        norm_ptr = k_norm_ptr
    low = tl.load(base + column, mask=real, other=0.0).to(tl.float32)
    high = tl.load(base + HALF + column, mask=real, other=0.0).to(tl.float32)
    if HAS_NORM:
        mean = (tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)
        low_weight = tl.load(norm_ptr + column, mask=real, other=0.0).to(tl.float32)
        high_weight = tl.load(norm_ptr + HALF + column, mask=real, other=0.0).to(tl.float32)
        low = (low_weight * (low * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        high = (high_weight * (high * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    place = (token % places) * (2 * HALF)
    cos_low = tl.load(cos_ptr + place + column, mask=real, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + place + HALF + column, mask=real, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + place + column, mask=real, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + place + HALF + column, mask=real, other=0.0).to(tl.float32)
    new_low, new_high = turned(low, high, cos_low, cos_high, sin_low, sin_high, kind)
    tl.store(base + column, new_low, mask=real)
    tl.store(base + HALF + column, new_high, mask=real)


@triton.jit
def silu_mul_kernel(
    gate_ptr,  # [count], overwritten by silu(gate) * up
    up_ptr,  # [count]
    count,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    kind = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=real, other=0.0).to(tl.float32)
    tl.store(gate_ptr + place, silu_mul(gate, up, kind), mask=real)


def turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, eps: float
) -> None:
    """Norms the heads of q [B, n, Hq * D] and k [B, n, Hkv * D] where the model does, and turns
    them by cos, sin [B or 1, n, D], in place."""
    half = weights.head_size // 2
    has_norm = weights.query_norm is not None
    rotary_kernel[(q.shape[0] * q.shape[1], weights.heads + weights.kv_heads)](
        *(q, k, cos, sin),
        weights.query_norm if has_norm else q,
        weights.key_norm if has_norm else q,
        weights.heads,
        weights.kv_heads,
        cos.shape[0] * cos.shape[1],
        float(eps),
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        HAS_NORM=has_norm,
        num_warps=1,
        **chained(q),
        **FUSION,
    )


def turns_at_once(weights: DecoderWeights, x: Tensor) -> bool:
    """Whether the launch that makes q, k and v of x [B, n, H] can turn them, too."""
    heads = weights.heads + 2 * weights.kv_heads
    rows, width, size = x.shape[0] * x.shape[1], x.shape[2], weights.head_size
    return weights.query_norm is None and turns(rows, heads * size, width, size)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the place of `gate`."""
    count = gate.numel()
    silu_mul_kernel[(triton.cdiv(count, _GATED_BLOCK),)](
        gate, up, count, BLOCK=_GATED_BLOCK, num_warps=4, **chained(gate), **FUSION
    )
    return gate


def decoder_layer(
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
    """[B, n, H]. Nothing is read back."""
    if hidden.numel() == 0:
        return torch.empty_like(hidden)
    n = hidden.shape[1]
    width = guess_width or max(1, n - guesses_from)
    # behind no verify rows the first chain of guesses stands where they would
    chains = Chains(guesses_from or min(n, width), width, kept=guess_width is not None)
    gated = gated_from < n

    def terms_of(indices: tuple[int, ...]) -> Terms | None:
        return gather([weights.low_rank[i] for i in indices]) if gated else None

    def few(indices: tuple[int, ...], x: Tensor) -> bool:
        """Whether one launch can take the linear layers of `indices` on x."""
        biases = [weights.biases[i] is not None for i in indices]
        return takes(x, [weights.linears[i] for i in indices]) and len(set(biases)) == 1

    def project(indices: tuple[int, ...], x: Tensor, **last: Any) -> list[Tensor]:
        """The linear layers of `indices` on the same x [B, n, width], without terms; `last` as in
        `few_rows`."""
        layers = [weights.linears[i] for i in indices], [weights.biases[i] for i in indices]
        if few(indices, x):
            return few_rows(x, *layers, **last)
        return [linear(x, *layer) for layer in zip(*layers, strict=True)]

    def with_terms(indices: tuple[int, ...], x: Tensor, terms: Terms, **last: Any) -> list[Tensor]:
        """The same with terms; `last` as in `expand`."""
        if few(indices, x) and takes(x, [terms.a]):
            *outs, shrunk = project(indices, x, more=terms.a)
        else:
            outs, shrunk = project(indices, x), linear(x, terms.a)
        return expand(outs, shrunk, terms, gated_from, **last)

    def added(index: int, x: Tensor, h: Tensor) -> Tensor:
        """h + the linear layer on x, both [B, n, H] or x [B, n, width]."""
        terms = terms_of((index,))
        if terms is not None:
            return with_terms((index,), x, terms, add=h)[0]
        if few((index,), x):
            return project((index,), x, add=h)[0]
        return h + project((index,), x)[0]

    with device_of(hidden):
        x = rms_norm(hidden, weights.attention_norm, eps)
        terms = terms_of((0, 1, 2))
        if terms is None and few((0, 1, 2), x) and turns_at_once(weights, x):
            q, k, v = project((0, 1, 2), x, turn=(cos, sin))
        else:
            wanted = ((0, 1, 2), x)
            q, k, v = project(*wanted) if terms is None else with_terms(*wanted, terms)
            turn(q, k, cos, sin, weights, eps)
        q, k, v = (part.unflatten(2, (-1, weights.head_size)).transpose(1, 2) for part in (q, k, v))
        mixed = block_attention(
            q, k, v, k_cache, v_cache, lengths, scale, window, None, None, chains=chains
        )
        h = added(3, mixed.transpose(1, 2).flatten(2), hidden)
        x = rms_norm(h, weights.mlp_norm, eps)
        terms = terms_of((4, 5))
        if terms is not None:
            (inner,) = with_terms((4, 5), x, terms, swiglu=True)
        elif few((4, 5), x):
            (inner,) = project((4, 5), x, swiglu=True)
        else:
            inner = swiglu(*project((4, 5), x))
        return added(6, inner, h)
