"""block_attention in Triton: one program per KV head, tile of query rows and split of the cache.

A group's query heads are folded into query rows, so a tile of keys and values is read once for all
of them. Tiles and splits begin at fixed slots, wherever the block begins: a key takes the same
place in the same sum whether it comes from the cache or from the block, and a masked one adds exact
zeros. So the bits of a token's result do not depend on where its block began. Splits that a row
does not reach return at once; a second kernel adds the others in order, without atomics.

A block may hold several chains of tokens behind the same cache, each of which sees itself alone
(`Chains`): to a program its chain is all of the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm_kernels._triton import FUSION, await_inputs, chained, device_of, tanh
from cllm_kernels.block_attention import empty_output
from cllm_kernels.block_attention.triton_sizes import Chains, combine_shape, cuts, tile_shape

_APPEND_ROWS = 16  # tokens that one step of the append copies


@triton.jit
def chain_of(number, n, first_tokens, chain_tokens, CHAINED: tl.constexpr):
    """Where a chain begins in the block, and its tokens."""
    begins = n * 0
    tokens = n
    if CHAINED:  # sizes of 1 are constants to a kernel, which branches may not redefine
        begins = tl.where(number == 0, 0, first_tokens + (number - 1) * chain_tokens)
        tokens = tl.where(number == 0, first_tokens, tl.minimum(chain_tokens, n - begins))
    return begins, tokens


@triton.jit
def reach(lengths_ptr, row, capacity, window, split_slots, HAS_WINDOW: tl.constexpr):
    """Where a row stands: (length, first slot that its block sees, the split that slot is in)."""
    length = tl.load(lengths_ptr + row)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    first = length * 0
    if HAS_WINDOW:
        first = tl.maximum(length - window + 1, 0)
    return length, first, first // split_slots


@triton.jit
def block_attention_tiles_kernel(
    q_ptr,  # [B, Hq, n, D]
    k_new_ptr,  # [B, Hkv, n, D]
    v_new_ptr,  # [B, Hkv, n, D]
    k_cache_ptr,  # [B, Hkv, capacity, D], mutated
    v_cache_ptr,  # [B, Hkv, capacity, D], mutated
    lengths_ptr,  # [B] int64
    out_ptr,  # [B, n, Hq, D], written where SPLIT is false
    part_ptr,  # [B * Hkv, splits, G * n, D] float32, written where SPLIT: unscaled sums
    best_ptr,  # [B * Hkv, splits, G * n] float32, written where SPLIT: their largest score
    total_ptr,  # [B * Hkv, splits, G * n] float32, written where SPLIT: their sum of weights
    q_row,  # strides in elements: of a row of the batch, of a head, of a token or slot
    q_head,
    q_token,
    k_new_row,
    k_new_head,
    k_new_token,
    v_new_row,
    v_new_head,
    v_new_token,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    n,
    groups,  # G, query heads per KV head
    kv_heads,
    capacity,
    first_tokens,  # as in `Chains`, read where CHAINED
    chain_tokens,
    q_tiles,
    splits,
    split_slots,  # a multiple of BLOCK_N
    window,
    scale,
    softcap,
    D: tl.constexpr,
    D_PAD: tl.constexpr,  # D, padded to a power of two
    HAS_WINDOW: tl.constexpr,
    CHAINED: tl.constexpr,
    KEPT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,  # keys and values of every token begin at a multiple of 16 bytes
    GUARDED: tl.constexpr,  # a value that is not finite reaches no query that does not see it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    APPEND_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    # Programs that share keys and values, the query tiles of a KV head, are neighbours.
    q_tile = tl.program_id(0) % q_tiles
    kv_row = tl.program_id(0) // q_tiles
    row = (kv_row // kv_heads).to(tl.int64)
    head = (kv_row % kv_heads).to(tl.int64)
    length, first, first_split = reach(lengths_ptr, row, capacity, window, split_slots, HAS_WINDOW)
    chain = tl.program_id(2)
    begins, tokens = chain_of(chain, n, first_tokens, chain_tokens, CHAINED)
    place = tl.program_id(1)
    split = first_split + place
    feature = tl.arange(0, D_PAD)
    real_feature = feature < D
    k_new_base = k_new_ptr + row * k_new_row + head * k_new_head + begins * k_new_token
    v_new_base = v_new_ptr + row * v_new_row + head * v_new_head + begins * v_new_token
    k_base = k_cache_ptr + row * k_row + head * k_head
    v_base = v_cache_ptr + row * v_row + head * v_head

    # The block's keys and values are stored by one program and read from the block by all, so
    # nobody waits: slots below `length` are read from the cache, those above only written.
    if (place == 0) & (q_tile == 0) & (KEPT | (chain == 0)):
        for begin in range(0, tokens, APPEND_ROWS):
            token = begin + tl.arange(0, APPEND_ROWS)
            slot = (length + begins + token).to(tl.int64)
            copied = ((token < tokens) & (slot < capacity))[:, None] & real_feature[None, :]
            token = token.to(tl.int64)
            k = tl.load(k_new_base + token[:, None] * k_new_token + feature[None, :], mask=copied)
            v = tl.load(v_new_base + token[:, None] * v_new_token + feature[None, :], mask=copied)
            tl.store(k_base + slot[:, None] * k_slot + feature[None, :], k, mask=copied)
            tl.store(v_base + slot[:, None] * v_slot + feature[None, :], v, mask=copied)

    begin = tl.maximum(split * split_slots, first // BLOCK_N * BLOCK_N)
    end = length + tokens
    if place < splits - 1:  # the last one goes on to the end, however few splits were launched
        end = tl.minimum(end, (split + 1) * split_slots)
    if (begin >= end) | (q_tile * BLOCK_M >= groups * tokens):
        return

    member = q_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # of the chain's G * tokens query rows
    real_member = member < groups * tokens
    token = member % tokens
    q_offset = (head * groups + member // tokens) * q_head + (begins + token).to(tl.int64) * q_token
    q = tl.load(
        q_ptr + row * q_row + q_offset[:, None] + feature[None, :],
        mask=real_member[:, None] & real_feature[None, :],
        other=0.0,
    )
    position = length + token
    column = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    ones = tl.full([BLOCK_N, 16], 1.0, q_ptr.dtype.element_ty)

    for start in range(begin, end, BLOCK_N):
        slot = start + column
        fresh = slot >= length  # a token of the block, read where it came from
        old_place = slot.to(tl.int64)
        new_place = (slot - length).to(tl.int64)
        k_line = tl.where(fresh, k_new_base + new_place * k_new_token, k_base + old_place * k_slot)
        v_line = tl.where(fresh, v_new_base + new_place * v_new_token, v_base + old_place * v_slot)
        if ALIGNED:  # a choice between two pointers hides from the compiler what both promise
            k_line = tl.multiple_of(k_line, 16)
            v_line = tl.multiple_of(v_line, 16)
        seen = (slot >= first) & (slot < length + tokens)
        k = tl.load(
            k_line[None, :] + feature[:, None],
            mask=real_feature[:, None] & seen[None, :],
            other=0.0,
        )
        v = tl.load(
            v_line[:, None] + feature[None, :],
            mask=seen[:, None] & real_feature[None, :],
            other=0.0,
        )
        visible = slot[None, :] <= position[:, None]
        if HAS_WINDOW:
            visible = visible & (slot[None, :] > position[:, None] - window)
        # "ieee": fp32 operands are multiplied as they are, not rounded to tf32.
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(visible, scores, float("-inf"))
        if GUARDED:  # 0 times what only other queries see is not 0 where that is not finite
            finite = (v - v) == 0
            poisoned = tl.min(finite.to(tl.int32), axis=1) == 0
            v = tl.where(finite, v, 0.0)
            scores = tl.where(visible & poisoned[None, :], float("nan"), scores)
        best_now = tl.maximum(best, tl.max(scores, axis=1))
        # A query that has seen nothing yet: 0 instead of -inf, whose difference to itself is NaN.
        base = tl.where(best_now == float("-inf"), 0.0, best_now)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(best - base)
        weights = weights.to(v.dtype)
        # A product adds up in one order in every tile; where tl.sum's threads stand, and so its
        # order, hangs on the number of query rows. All columns of `sums` are the same.
        sums = tl.dot(weights, ones, input_precision="ieee")
        total = total * fade + tl.max(sums, axis=1)
        acc = tl.dot(weights, v, acc * fade[:, None], input_precision="ieee")
        best = best_now

    stored = real_member[:, None] & real_feature[None, :]
    if SPLIT:
        line = (kv_row.to(tl.int64) * splits + place) * (groups * n) + groups * begins + member
        tl.store(part_ptr + line[:, None] * D + feature[None, :], acc, mask=stored)
        tl.store(best_ptr + line, best, mask=real_member)
        tl.store(total_ptr + line, total, mask=real_member)
    else:
        line = (row * n + begins + token) * (kv_heads * groups) + head * groups + member // tokens
        # Every query sees itself, so its sum is not 0; a padding row has none to divide by.
        out = acc / tl.where(real_member, total, 1.0)[:, None]
        tl.store(
            out_ptr + line[:, None] * D + feature[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=stored,
        )


@triton.jit
def block_attention_combine_kernel(
    part_ptr,  # [B * Hkv, splits, G * n, D] float32
    best_ptr,  # [B * Hkv, splits, G * n] float32
    total_ptr,  # [B * Hkv, splits, G * n] float32
    lengths_ptr,  # [B] int64
    out_ptr,  # [B, n, Hq, D], written
    n,
    groups,
    kv_heads,
    capacity,
    first_tokens,
    chain_tokens,
    tiles,
    splits,
    split_slots,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    tile = tl.program_id(0) % tiles
    kv_row = tl.program_id(0) // tiles
    row = (kv_row // kv_heads).to(tl.int64)
    head = (kv_row % kv_heads).to(tl.int64)
    length, _, first_split = reach(lengths_ptr, row, capacity, window, split_slots, HAS_WINDOW)
    begins, tokens = chain_of(tl.program_id(1), n, first_tokens, chain_tokens, CHAINED)
    # Splits beyond have returned without a word: what stands in their place is not read.
    reached = tl.minimum((length + tokens - 1) // split_slots - first_split + 1, splits)
    member = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.arange(0, D_PAD)
    real_member = member < groups * tokens
    stored = real_member[:, None] & (feature < D)[None, :]
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, D_PAD], tl.float32)
    for place in range(0, reached):
        line = (kv_row.to(tl.int64) * splits + place) * (groups * n) + groups * begins + member
        part = tl.load(part_ptr + line[:, None] * D + feature[None, :], mask=stored, other=0.0)
        part_best = tl.load(best_ptr + line, mask=real_member, other=0.0)
        part_total = tl.load(total_ptr + line, mask=real_member, other=1.0)
        best_now = tl.maximum(best, part_best)
        base = tl.where(best_now == float("-inf"), 0.0, best_now)
        fade = tl.exp(best - base)
        weight = tl.exp(part_best - base)
        total = total * fade + part_total * weight
        acc = acc * fade[:, None] + part * weight[:, None]
        best = best_now
    token = begins + member % tokens
    line = (row * n + token) * (kv_heads * groups) + head * groups + member // tokens
    tl.store(
        out_ptr + line[:, None] * D + feature[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=stored,
    )


def _aligned(tensor: Tensor) -> bool:
    """Whether every [D] of it begins at a multiple of 16 bytes."""
    step = 16 // tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(s % step == 0 for s in tensor.stride()[:3])


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
    *,
    chains: Chains | None = None,
    split_slots: int | None = None,
) -> Tensor:
    """Launches the kernels; nothing is read back.

    Args:
        chains: None: the block is one.
        split_slots: overrides `split_size` (tests).
    """
    batch, heads, n, width = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    out = empty_output(q)
    if out.numel() == 0:
        return out
    q, k_new, v_new = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k_new, v_new))
    groups = heads // kv_heads
    padded = max(16, triton.next_power_of_2(width))
    aligned = all(_aligned(t) for t in (k_new, v_new, k_cache, v_cache))
    cut = chains or Chains(n, n, False)
    most = max(cut.first, min(cut.width, n - cut.first))  # tokens of a chain
    shape = tile_shape(groups * most, padded, q.dtype, aligned)
    q_tiles = triton.cdiv(groups * most, shape["BLOCK_M"])
    split_slots, splits = cuts(max_length or capacity, window, most, split_slots, shape["BLOCK_N"])
    if window is not None and splits > 1:
        splits += 1  # a window need not begin where a split does
    lines = (batch * kv_heads, splits, groups * n)
    if splits > 1:
        part = torch.empty((*lines, width), dtype=torch.float32, device=q.device)
        best = torch.empty(lines, dtype=torch.float32, device=q.device)
        total = torch.empty(lines, dtype=torch.float32, device=q.device)
    else:
        part = best = total = out
    sizes = (n, groups, kv_heads, capacity, cut.first, cut.width)
    count = cut.count(n)
    constants = {
        "D": width,
        "D_PAD": padded,
        "HAS_WINDOW": window is not None,
        "CHAINED": count > 1,
    }
    with device_of(q):
        block_attention_tiles_kernel[(batch * kv_heads * q_tiles, splits, count)](
            q,
            k_new,
            v_new,
            k_cache,
            v_cache,
            lengths,
            out,
            part,
            best,
            total,
            *q.stride()[:3],
            *k_new.stride()[:3],
            *v_new.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *sizes,
            q_tiles,
            splits,
            split_slots,
            window or 0,
            float(scale),
            softcap or 0.0,
            HAS_CAP=softcap is not None,
            KEPT=cut.kept,
            SPLIT=splits > 1,
            ALIGNED=aligned,
            # the range of bfloat16 is that of the sums
            GUARDED=q.dtype != torch.bfloat16,
            APPEND_ROWS=_APPEND_ROWS,
            **constants,
            **shape,
            **chained(q),
            **FUSION,
        )
        if splits > 1:
            rows = combine_shape(padded)
            tiles = triton.cdiv(groups * most, rows["BLOCK_R"])
            block_attention_combine_kernel[(batch * kv_heads * tiles, count)](
                *(part, best, total, lengths, out),
                *sizes,
                tiles,
                splits,
                split_slots,
                window or 0,
                **constants,
                **rows,
                **chained(q),
                **FUSION,
            )
    return out
