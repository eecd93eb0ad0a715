"""block_attention on the CPU: the append in C++, attention by torch's SDPA.

A group's query heads are folded into query rows, [B, Hkv, G * n, D], so that keys and values are
read as they stand, not repeated. SDPA sums over keys in blocks of 512, in order, and a masked block
adds exact zeros: so it is handed whole blocks of slots, the fewest that cover what the rows see (a
cache that ends earlier ends the last one), and a token's bits do not depend on where its block
began. Where soft-capped, which SDPA is not, the same is done here in fp32.

Slots that a row does not see but the view covers reach SDPA under a mask of -inf. That silences
whatever is finite; where one holds NaN, infinity or a number near the end of the range, the view is
copied with zeros in its place. Where such a slot is one that some queries see (a wrong guess that
overflows, say), tokens attend one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module
from cllm_kernels.block_attention import empty_output, no_room

_C = native_module()

_KEY_BLOCK = 512  # SDPA's on the CPU
_SEEN_BY_SOME = 2  # of `block_unsafe_cpu`: in slots that not every query sees


def _side(new: Tensor, cache: Tensor) -> tuple[int, ...]:
    return (new.data_ptr(), cache.data_ptr(), *new.stride()[:3], *cache.stride()[:3])


@torch.no_grad()
def block_attention_cpu(
    q: Tensor,  # [B, Hq, n, D]
    k_new: Tensor,  # [B, Hkv, n, D]
    v_new: Tensor,  # [B, Hkv, n, D]
    k_cache: Tensor,  # [B, Hkv, C, D], mutated
    v_cache: Tensor,  # [B, Hkv, C, D], mutated
    lengths: Tensor,  # [B]
    scale: float,
    window: int | None,
    softcap: float | None,
    max_length: int | None,  # unused: the lengths themselves can be read here
) -> Tensor:
    """[B, Hq, n, D]. Raises ValueError, naming the row, if a block does not fit its cache."""
    batch, _, n, width = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    code, threads = DTYPE_CODES[q.dtype], torch.get_num_threads()
    k_new, v_new = (t if t.stride(3) == 1 else t.contiguous() for t in (k_new, v_new))
    sides = _side(k_new, k_cache), _side(v_new, v_cache)
    append = (*sides, lengths.data_ptr(), code, batch, kv_heads, n, width, capacity)
    row = _C.block_append_cpu(*append, threads)
    if row >= 0:
        raise no_room(lengths, n, k_cache, row)
    if q.numel() == 0:
        return empty_output(q)

    shortest, longest = (int(length) for length in torch.aminmax(lengths))
    first = 0
    if window is not None:
        first = max(shortest - window + 1, 0) // _KEY_BLOCK * _KEY_BLOCK
    end = min(-(-(longest + n) // _KEY_BLOCK) * _KEY_BLOCK, capacity)
    view = (first, end - first, window or 0)
    keys, values = k_cache[:, :, first:end], v_cache[:, :, first:end]
    unsafe = _C.block_unsafe_cpu(*append, *view, threads)
    if unsafe & _SEEN_BY_SOME:  # token by token: each sees others
        parts = [
            _attended(
                q[:, :, token : token + 1],
                *_silenced(keys, values, lengths + token, 1, first, window),
                lengths + token,
                first,
                scale,
                window,
                softcap,
            )
            for token in range(n)
        ]
        return empty_output(q).copy_(torch.cat(parts, dim=2))
    if unsafe:
        keys, values = _silenced(keys, values, lengths, n, first, window)
    out = _attended(q, keys, values, lengths, first, scale, window, softcap)
    return empty_output(q).copy_(out)


def _attended(
    q: Tensor,  # [B, Hq, n, D]
    keys: Tensor,  # [B, Hkv, S, D]
    values: Tensor,  # [B, Hkv, S, D]
    lengths: Tensor,  # [B]
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[B, Hq, n, D]: attention of a block behind `lengths` to the slots from `first` on."""
    batch, heads, n, width = q.shape
    kv_heads, slots = keys.shape[1:3]
    groups = heads // kv_heads
    folded = q.reshape(batch, kv_heads, groups * n, width)
    dtype = torch.float32 if softcap is not None else q.dtype
    mask = torch.empty(batch, 1, groups * n, slots, dtype=dtype, device="cpu")
    view = (first, slots, window or 0)
    sizes = (lengths.data_ptr(), batch, n, *view, groups, DTYPE_CODES[dtype])
    _C.block_mask_cpu(*sizes, mask.data_ptr(), torch.get_num_threads())
    if softcap is None:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        out = _softcapped(folded, keys, values, mask, scale, softcap)
    return out.reshape(batch, heads, n, width)


def _silenced(
    keys: Tensor,  # [B, Hkv, S, D]
    values: Tensor,  # [B, Hkv, S, D]
    lengths: Tensor,  # [B]
    n: int,
    first: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Copies with zeros in the slots that no query of the row sees."""
    slot = torch.arange(first, first + keys.shape[2], device="cpu")
    seen = slot < lengths[:, None] + n  # [B, S]
    if window is not None:
        seen &= slot > lengths[:, None] - window
    seen = seen[:, None, :, None]
    return torch.where(seen, keys, 0), torch.where(seen, values, 0)


def _softcapped(
    folded: Tensor,  # [B, Hkv, G * n, D]
    keys: Tensor,  # [B, Hkv, S, D]
    values: Tensor,  # [B, Hkv, S, D]
    mask: Tensor,  # [B, 1, G * n, S] float32, 0 or -inf
    scale: float,
    softcap: float,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap) + mask) v in fp32, a block of keys a time."""
    q = folded.float() * (scale / softcap)
    best = q.new_full((*q.shape[:3], 1), float("-inf"))
    total = torch.zeros_like(best)
    acc = torch.zeros_like(q)
    for begin in range(0, keys.shape[2], _KEY_BLOCK):
        block = slice(begin, begin + _KEY_BLOCK)
        scores = (q @ keys[:, :, block].float().transpose(2, 3)).tanh_().mul_(softcap)
        scores += mask[..., block]
        best_now = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        # A query that has seen nothing yet: 0 instead of -inf, whose difference to itself is NaN.
        base = best_now.masked_fill(best_now == float("-inf"), 0.0)
        weights = scores.sub_(base).exp_()
        fade = (best - base).exp_()
        total = total * fade + weights.sum(dim=-1, keepdim=True)
        acc = acc * fade + weights @ values[:, :, block].float()
        best = best_now
    return acc / total
