"""Append a block's keys and values at each row's own length, and attend to the ragged cache.

What is made once per forward and shared by all layers (positions, the boolean mask, FlexAttention's
block mask) is made beforehand and not timed, for every variant. Every variant writes the block into
the cache. "ragged" rows are spread evenly from an eighth of the context to all of it; a mask lets
SDPA handle them, at the cost of the longest row for each.

    python benchmarks/kernels/block_attention.py --device cpu --record
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels.cases import (
    Case,
    Inputs,
    Run,
    Variant,
    compiled,
    itemsize,
    own_variants,
    short,
)
from benchmarks.kernels.harness import main
from cllm_kernels.block_attention import OP

BLOCK = 16  # tokens in a window
SMOLLM2 = {"Hq": 9, "Hkv": 3, "D": 64}
LLAMA3 = {"Hq": 32, "Hkv": 8, "D": 128}
# (rows, context, ragged)
CPU = [(1, 128, False), (1, 512, False), (1, 2048, False), (8, 512, False), (8, 512, True),
       (8, 2048, False), (8, 2048, True)]  # fmt: skip
CUDA = [(1, 1024, False), (1, 32768, False), (8, 4096, False), (8, 4096, True), (8, 32768, False),
        (8, 32768, True), (32, 1024, False), (32, 8192, False), (32, 8192, True)]  # fmt: skip
QUICK = [(2, 40, False), (3, 40, True)]
MARGIN = 128  # slots of the cache behind the longest row's context


def lengths_of(rows: int, context: int, ragged: bool) -> list[int]:
    if not ragged:
        return [context] * rows
    shortest = context // 8
    return [shortest + (context - shortest) * row // (rows - 1) for row in range(rows)]


def make_inputs(
    lengths: list[int], heads: dict[str, int], dtype: torch.dtype
) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        rows, capacity = len(lengths), max(lengths) + MARGIN
        end = max(lengths) + BLOCK
        query_heads, heads_kv, width = heads["Hq"], heads["Hkv"], heads["D"]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        where = torch.tensor(lengths, device=device)
        positions = where[:, None] + torch.arange(BLOCK, device=device)  # [B, n]
        seen = torch.arange(end, device=device) <= positions[:, :, None]  # [B, n, end]
        slots = positions[:, None, :, None].expand(rows, heads_kv, BLOCK, width)
        return {
            "q": random(rows, query_heads, BLOCK, width),
            "k_new": random(rows, heads_kv, BLOCK, width),
            "v_new": random(rows, heads_kv, BLOCK, width),
            "k_cache": random(rows, heads_kv, capacity, width),
            "v_cache": random(rows, heads_kv, capacity, width),
            "lengths": where,
            "slots": slots,
            "mask": seen[:, None],
            "end": end,  # slots that any row looks at
            "spans": [length + BLOCK for length in lengths],
        }

    return make


def append(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Writes the block into the cache; the part of the cache that any row looks at."""
    k_cache, v_cache, slots = inputs["k_cache"], inputs["v_cache"], inputs["slots"]
    k_cache.scatter_(2, slots, inputs["k_new"])
    v_cache.scatter_(2, slots, inputs["v_new"])
    end = inputs["end"]
    return k_cache[:, :, :end], v_cache[:, :, :end]


def repeat(heads: Tensor, groups: int) -> Tensor:
    """[B, Hkv, L, D] -> [B, Hkv * groups, L, D], as model code does it."""
    rows, count, length, width = heads.shape
    spread = heads[:, :, None].expand(rows, count, groups, length, width)
    return spread.reshape(rows, count * groups, length, width)


def formula(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[1] // keys.shape[1]
    scores = q @ repeat(keys, groups).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.float().masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(q.dtype) @ repeat(values, groups)


def written_out(attend: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
    return lambda inputs: Run(lambda: attend(inputs["q"], *append(inputs), inputs["mask"]))


def sdpa_repeated(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[1] // keys.shape[1]
    return scaled_dot_product_attention(
        q, repeat(keys, groups), repeat(values, groups), attn_mask=mask
    )


def sdpa_grouped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def sdpa_lower_right(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """No mask in memory: causal from the lower right corner, where all rows are equally long."""
    from torch.nn.attention.bias import causal_lower_right

    corner = causal_lower_right(q.shape[2], keys.shape[2])
    return scaled_dot_product_attention(q, keys, values, attn_mask=corner, enable_gqa=True)


def sdpa_by_row(inputs: Inputs) -> Run:
    """Each row alone on just its own keys: no work on padding, one launch (or more) per row."""

    def call() -> Tensor:
        keys, values = append(inputs)
        out = torch.empty_like(inputs["q"])
        for row, span in enumerate(inputs["spans"]):
            one = slice(row, row + 1)
            out[one] = sdpa_grouped(
                inputs["q"][one],
                keys[one, :, :span],
                values[one, :, :span],
                inputs["mask"][one, :, :, :span],
            )
        return out

    return Run(call)


def flex(inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, device, lengths = inputs["q"].shape[0], inputs["q"].device, inputs["lengths"]
    mask = create_block_mask(
        lambda row, _, query, key: key <= lengths[row] + query,
        rows,
        None,
        BLOCK,
        inputs["end"],
        device=device,
    )
    attend = compiled(flex_attention)
    return Run(lambda: attend(inputs["q"], *append(inputs), block_mask=mask, enable_gqa=True))


def ours(inputs: Inputs) -> Run:
    names = ("q", "k_new", "v_new", "k_cache", "v_cache", "lengths")
    arguments = tuple(inputs[name] for name in names)
    return Run(lambda: cllm_kernels.block_attention(*arguments))


def products(inputs: Inputs) -> Run:
    """Scores and mixtures of all rows at the longest row's length, grouped heads side by side."""
    rows, query_heads, block, width = inputs["q"].shape
    heads = inputs["k_new"].shape[1]
    stacked = inputs["q"].reshape(rows * heads, query_heads // heads * block, width)
    keys = inputs["k_cache"][:, :, : inputs["end"]].reshape(rows * heads, -1, width)
    values = inputs["v_cache"][:, :, : inputs["end"]].reshape(rows * heads, -1, width)
    weights = torch.rand(*stacked.shape[:2], inputs["end"], device=keys.device).to(keys.dtype)
    return Run(lambda: (torch.bmm(stacked, keys.transpose(1, 2)), torch.bmm(weights, values)))


def case(
    rows: int,
    context: int,
    ragged: bool,
    heads: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    lengths = lengths_of(rows, context, ragged)
    query_heads, kv_heads, width = heads["Hq"], heads["Hkv"], heads["D"]
    # what each row sees: its context, and the block up to itself
    pairs = sum(BLOCK * length for length in lengths) + rows * BLOCK * (BLOCK + 1) // 2
    padded = rows * BLOCK * (max(lengths) + BLOCK)
    flop, padded_flop = (4 * query_heads * width * count for count in (pairs, padded))
    size = itemsize(dtype)
    block = 2 * rows * BLOCK * width * (query_heads + 2 * kv_heads) * size  # q, out; new read, kept
    moved = block + 2 * kv_heads * width * sum(lengths) * size
    padded_moved = block + 2 * kv_heads * width * rows * (max(lengths) + BLOCK) * size
    # repeat_kv writes every group's copy and reads it again
    copies = padded_moved + 2 * 2 * query_heads * width * rows * (max(lengths) + BLOCK) * size

    def baseline(
        name: str, build: Callable[[Inputs], Run], flop: int, moved: int, why_not: str | None = None
    ) -> Variant:
        return Variant(name, "baseline", build, flop, moved, unavailable=why_not)

    unequal = "rows of unequal length have no common corner" if ragged else None
    scores = 4 * rows * query_heads * BLOCK * (max(lengths) + BLOCK) * 4  # fp32, written and read
    return Case(
        name=f"{short(dtype)} B={rows} n={BLOCK} context={context}" + (" ragged" if ragged else ""),
        dtype=dtype,
        shape={"B": rows, "n": BLOCK, "context": context, "ragged": ragged, **heads},
        make_inputs=make_inputs(lengths, heads, dtype),
        variants=[
            baseline("written out in torch", written_out(formula), padded_flop, copies + scores),
            baseline("compiled, written out", written_out(compiled(formula)), padded_flop, copies),
            baseline("SDPA, mask", written_out(sdpa_grouped), padded_flop, padded_moved),
            baseline("SDPA, mask, repeated heads", written_out(sdpa_repeated), padded_flop, copies),
            baseline(
                "SDPA, causal, no mask",
                written_out(sdpa_lower_right),
                padded_flop,
                padded_moved,
                unequal,
            ),
            baseline("SDPA row by row", sdpa_by_row, flop, moved),
            baseline("FlexAttention", flex, flop, moved),
            *own_variants(OP, device, ours, flop, moved),
            Variant(
                "matmuls alone", "matmuls", products, padded_flop, padded_moved, compared=False
            ),
        ],
        flop_floor=flop,
        bytes_floor=moved,
        tolerance=1e-4 if dtype is torch.float32 else 2e-2,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    on_gpu = device.type == "cuda"
    heads = LLAMA3 if on_gpu else SMOLLM2
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    sizes = QUICK if quick else CUDA if on_gpu else CPU
    return [case(*size, heads, dtype, device) for dtype in dtypes for size in sizes]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("block_attention", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
