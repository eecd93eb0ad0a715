"""decoder_layer: a decoder layer of the Llama kind over the few rows of a block, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, eager, without_autocast
from cllm_kernels.decoder_layer.checks import (
    checked_rows,
    checked_scale,
    checked_window,
    explain,
    fits,
    refuse_gradients,
)
from cllm_kernels.decoder_layer.weights import DecoderWeights, from_plain, plain_tensors


def _reference() -> Any:
    from cllm_kernels.decoder_layer import reference

    return reference.decoder_layer


def _cpp() -> Any:
    from cllm_kernels.decoder_layer import native

    return native.decoder_layer_cpu


def _triton() -> Any:
    from cllm_kernels.decoder_layer import triton_kernel

    # what its kernels are not made for are torch's own products
    return without_autocast(triton_kernel.decoder_layer)


OP = register(
    Op(
        name="decoder_layer",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def decoder_layer(
    hidden: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    eps: float,
    scale: float | None = None,
    window: int | None = None,
    guesses_from: int | None = None,
    guess_width: int | None = None,
    gated_from: int | None = None,
) -> Tensor:
    """h + MLP(norm(h)) with h = hidden + attention(norm(hidden)), behind a ragged KV cache.

    The layer of Llama (Touvron et al. 2023): RMS norms (Zhang and Sennrich 2019), rotary positions
    of half-rotated heads (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU
    (Shazeer 2020); with biases that of Qwen2, with norms of the heads that of Qwen3. Made for few
    rows: on a CPU it is one native call instead of some fifty, on a GPU seven launches in 16 bits,
    four of them matrix products.

    Row b's keys and values stand at slots 0 .. lengths[b] - 1. Token i stands at position
    lengths[b] + i, its key and value are written to that slot, and it attends to the cached slots
    and to tokens 0 .. i. With `guesses_from` = v the block holds a window twice, v verify rows and
    then guess rows: token i >= v stands at position lengths[b] + i - v and attends to the cached
    slots and to tokens v .. i. Verify rows read nothing of guess rows, which may be garbage; what
    stands in the cache behind the verify rows' slots afterwards is of no use to anybody. With
    `guess_width` = w every w of the guess rows are a chain of their own, at positions from
    lengths[b] on, that sees the cached slots and itself: several candidates for the same places in
    one block (tree attention of SpecInfer, Miao et al. 2024, where only the root is shared). Token
    i's key and value then stand at slot lengths[b] + i, whatever chain it is of.

    Sums are fp32; 16-bit types are rounded where HuggingFace's modules round them. On the C++
    backend a row's result has the same bits beside any other rows, for any number of them and
    wherever its block begins; Triton's kernels are made for that, too, in 16 bits and for up to 64
    rows as in `block_linear`.

    Args (B rows of n tokens; sizes as in `DecoderWeights`):
        hidden: [B, n, H], contiguous, of the dtype and device of the weights.
        weights: checked when they were made.
        cos, sin: [B or 1, n, D], contiguous, of the same dtype: of every token's position.
        k_cache, v_cache: [B, Hkv, C, D], mutated in place; any strides, the last dimension
            contiguous. n <= C.
        lengths: [B] int64, contiguous; lengths[b] + n <= C.
        eps: added to the mean square in all norms.
        scale: factor of the scores; None: 1 / sqrt(D).
        window: None, or the number of positions a query sees, its own included.
        guesses_from: v from 0 to n; None: there are no guess rows.
        guess_width: w, at least 1; None: all guess rows are one chain, whose keys and values are
            not kept.
        gated_from: first token of every row that gets the low-rank terms; None: all of them.

    Returns:
        [B, n, H].

    Raises:
        ValueError: shapes, strides, devices or options that do not fit; on the CPU a row whose
            block does not fit its cache (on a GPU as in `block_attention`, but with `guess_width`
            it has to fit there, too). TypeError: a wrong
            dtype. RuntimeError: gradients were asked for; there are none. BackendError: see
            `use_backend`.
    """
    if not fits(hidden, weights, cos, sin, k_cache, v_cache, lengths):
        explain(hidden, weights, cos, sin, k_cache, v_cache, lengths)
    scale = checked_scale(weights, eps, scale)
    checked_window(window)
    guesses, gated = checked_rows(hidden.shape[1], guesses_from, guess_width, gated_from)
    if torch.is_grad_enabled():
        refuse_gradients(weights, hidden, cos, sin, k_cache, v_cache)
    places = (cos, sin, k_cache, v_cache, lengths)
    options = (scale, eps, window, guesses, guess_width, gated)
    if eager(hidden, *places) and not (hidden.is_neg() or cos.is_neg() or sin.is_neg()):
        return OP.resolve(hidden.device)(hidden, weights, *places, *options)
    return torch.ops.cllm_kernels.decoder_layer.default(
        hidden, plain_tensors(weights), weights.head_size, *places, *options
    )


LIBRARY.define(
    "decoder_layer(Tensor hidden, Tensor?[] weights, int head_size, Tensor cos, Tensor sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, float scale, float eps, int? window, "
    "int guesses_from, int? guess_width, int gated_from) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(
    hidden: Tensor, weights: Sequence[Tensor | None], head_size: int, *rest: Any
) -> Tensor:
    return OP.resolve(hidden.device)(hidden, from_plain(weights, head_size), *rest)


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


LIBRARY.impl("decoder_layer", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::decoder_layer", _fake, lib=LIBRARY)
