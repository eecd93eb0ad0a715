"""decoder_layer in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from cllm_kernels._common import without_autocast
from cllm_kernels.decoder_layer.checks import no_room
from cllm_kernels.decoder_layer.weights import DecoderWeights
from cllm_kernels.rms_norm.reference import rms_norm


def decoder_layer(hidden: Tensor, *rest: Any) -> Tensor:
    """`layer`. Raises ValueError, naming the row, if a block does not fit its cache."""
    k_cache, lengths = rest[3], rest[5]
    _check_room(lengths, hidden.shape[1], k_cache)
    return layer(hidden, *rest)


@without_autocast
def layer(
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
    """[B, n, H], every step a tensor of the dtype of `hidden`, as in HuggingFace's modules;
    nothing is read back to the host."""
    n = hidden.shape[1]

    def project(index: int, x: Tensor) -> Tensor:  # [B, n, width] -> [B, n, rows]
        out, pair = (
            linear(x, weights.linears[index], weights.biases[index]),
            weights.low_rank[index],
        )
        if pair is None:
            return out
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = (tensor.to(wide) for tensor in pair)
        term = linear(linear(x.to(wide), a).to(x.dtype).to(wide), b)
        term[:, :gated_from] = 0
        bias = weights.biases[index]
        full = linear(x.to(wide), weights.linears[index].to(wide))
        full = full if bias is None else full + bias.to(wide)
        out[:, gated_from:] = (full + term)[:, gated_from:].to(x.dtype)
        return out

    def heads(x: Tensor, norm: Tensor | None) -> Tensor:  # [B, n, h * D] -> [B, n, h, D]
        split = x.unflatten(2, (-1, weights.head_size))
        return split if norm is None else rms_norm(split, norm, eps)

    x = rms_norm(hidden, weights.attention_norm, eps)
    q = rotated(heads(project(0, x), weights.query_norm), cos, sin)
    k = rotated(heads(project(1, x), weights.key_norm), cos, sin)
    v = heads(project(2, x), None)
    _append(k_cache, k, lengths)
    _append(v_cache, v, lengths)
    seen = _seen(lengths, n, guesses_from, guess_width, k_cache.shape[2], window)
    h = hidden + project(3, _attention(q, k_cache, v_cache, seen, scale))
    x = rms_norm(h, weights.mlp_norm, eps)
    return h + project(6, silu(project(4, x)) * project(5, x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, n, h, D], every head turned by its token's position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]


def _append(cache: Tensor, block: Tensor, lengths: Tensor) -> None:
    """Writes `block` [B, n, Hkv, D] to slots lengths[b] .. of `cache` [B, Hkv, C, D]."""
    places = lengths[:, None] + torch.arange(block.shape[1], device=lengths.device)  # [B, n]
    index = places[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    cache.scatter_(2, index, block.transpose(1, 2))


def _seen(
    lengths: Tensor,
    n: int,
    guesses_from: int,
    guess_width: int | None,
    slots: int,
    window: int | None,
) -> Tensor:
    """[B, n, C] bool: what every token attends to."""
    slot = torch.arange(slots, device=lengths.device)
    token = torch.arange(n, device=lengths.device)[:, None]
    start = lengths[:, None, None]
    width = guess_width or max(1, n - guesses_from)
    chain = token - (token - guesses_from) % width  # where the chain of a guess begins
    shift = torch.where(token >= guesses_from, chain, 0)
    query = start + token - shift  # positions
    own = slot - start  # a slot's number in the block
    key = torch.where(own >= 0, slot - shift, slot)
    seen = (key <= query) & ((own < 0) | (own >= shift))
    return seen if window is None else seen & (key > query - window)


def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, n, Hq * D] from q [B, n, Hq, D]; sums and softmax in fp32, or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k_cache.shape[1], -1))
    used = seen.any(dim=1)[:, None, :, None]  # other slots may hold anything, NaN included
    keys, values = (torch.where(used, cache, 0).to(wide) for cache in (k_cache, v_cache))
    scores = scale * torch.einsum("bihgd,bhsd->bhgis", grouped, keys)
    hidden = ~seen[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    # per query, not per block: 0 * NaN of a slot that only other rows see is NaN
    weighted = torch.where(hidden[..., None], 0, scores[..., None] * values[:, :, None, None])
    return weighted.sum(dim=-2).to(q.dtype).permute(0, 3, 1, 2, 4).flatten(2)


def _check_room(lengths: Tensor, n: int, cache: Tensor) -> None:
    wrong = (lengths < 0) | (lengths > cache.shape[2] - n)
    if bool(wrong.any()):
        raise no_room(lengths, n, cache, int(wrong.long().argmax()))
