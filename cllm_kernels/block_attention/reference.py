"""block_attention in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention(
    q: Tensor,  # [B, Hq, n, D]
    k_new: Tensor,  # [B, Hkv, n, D]
    v_new: Tensor,  # [B, Hkv, n, D]
    k_cache: Tensor,  # [B, Hkv, C, D], mutated
    v_cache: Tensor,  # [B, Hkv, C, D], mutated
    lengths: Tensor,  # [B]
    scale: float,
    window: int | None,
    softcap: float | None,
    max_length: int | None,
) -> Tensor:
    """All rows at once, nothing read back to the host; sums in fp32 (fp64 for float64 inputs)."""
    batch, heads, n, width = q.shape
    if q.numel() == 0:
        return q.new_empty(batch, n, heads, width).transpose(1, 2)
    kv_heads, capacity = k_cache.shape[1:3]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    start = lengths.clamp(0, capacity)[:, None]  # [B, 1]
    slot = torch.arange(capacity, device=q.device)  # [C]
    token = torch.arange(n, device=q.device)  # [n]

    # 1. Append: slot s takes token s - start, where the block has one.
    source = slot - start  # [B, C]
    taken = ((source >= 0) & (source < n))[:, None, :, None]
    index = source.clamp(0, n - 1)[:, None, :, None].expand_as(k_cache)
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache.copy_(torch.where(taken, new.gather(2, index), cache))

    # 2. What a row attends to: its cached slots, then the block's own tokens.
    position = torch.cat([slot.expand(batch, -1), start + token], dim=1)  # [B, C + n]
    present = torch.cat([slot < start, (token >= 0).expand(batch, -1)], dim=1)  # [B, C + n]
    query = (start + token)[:, :, None]  # [B, n, 1]
    visible = present[:, None] & (position[:, None] <= query)  # [B, n, C + n]
    if window is not None:
        visible &= position[:, None] > query - window
    used = visible.any(dim=1)[:, None, :, None]  # other slots may hold anything, NaN included
    keys = torch.where(used, torch.cat([k_cache, k_new], dim=2), 0).to(accumulate)
    values = torch.where(used, torch.cat([v_cache, v_new], dim=2), 0).to(accumulate)

    # 3. softmax(softcap * tanh(scale * q k^T / softcap)) v, a group of query heads per KV head.
    grouped = q.to(accumulate).unflatten(1, (kv_heads, heads // kv_heads))
    scores = scale * torch.einsum("bhgid,bhsd->bhgis", grouped, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(dim=-1)
    out = torch.stack(
        [  # query by query: 0 * NaN of a slot that only later ones see is NaN
            torch.einsum(
                "bhgs,bhsd->bhgd",
                weights[:, :, :, i],
                torch.where(visible[:, i, None, :, None], values, 0),
            )
            for i in range(n)
        ],
        dim=1,
    ).to(q.dtype)  # [B, n, Hkv, G, D]
    return out.reshape(batch, n, heads, width).contiguous().transpose(1, 2)
