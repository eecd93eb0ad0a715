from __future__ import annotations

import triton

from cllm_kernels._triton import FUSION
from cllm_kernels.block_attention.triton_kernel import (
    _APPEND_ROWS,
    block_attention_combine_kernel,
    block_attention_tiles_kernel,
)
from cllm_kernels.block_attention.triton_sizes import combine_shape, tile_shape
from tests.kernels.aot import FLOATS

# (head size, query rows of a group, window and soft-cap, aligned keys and values): decoding's
# blocks, the largest tiles, and head sizes that are no power of two.
_CASES = {
    "fp32": ((64, 16, False, True), (128, 64, True, True), (256, 64, True, False)),
    "bf16": (
        (64, 16, False, True),
        (80, 64, False, True),
        (128, 32, False, True),
        (128, 128, True, True),
        (256, 128, True, True),
        (256, 128, True, False),
    ),
    "fp16": ((96, 64, True, True),),
}


def variants():
    for short, cases in _CASES.items():
        for width, rows, options, aligned in cases:
            padded = triton.next_power_of_2(width)
            shape = tile_shape(rows, padded, FLOATS[short], aligned)
            tiles = {k: v for k, v in shape.items() if k.startswith("BLOCK")}
            launch = {k: v for k, v in shape.items() if not k.startswith("BLOCK")}
            types = dict.fromkeys(("q_ptr", "out_ptr"), f"*{short}")
            types |= dict.fromkeys(("k_new_ptr", "v_new_ptr"), f"*{short}")
            types |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{short}")
            types |= dict.fromkeys(("part_ptr", "best_ptr", "total_ptr"), "*fp32")
            types |= {"lengths_ptr": "*i64", "scale": "fp32", "softcap": "fp32"}
            sizes = {"D": width, "D_PAD": padded, "HAS_WINDOW": options}
            flags = {
                "CHAINED": rows <= 64,
                "KEPT": rows <= 64,
                "HAS_CAP": options,
                "SPLIT": True,
                "ALIGNED": aligned,
                "GUARDED": short != "bf16",
                "APPEND_ROWS": _APPEND_ROWS,
                "PDL": False,
            }
            # compile_triton.py takes "tiles" at its word, and hides the alignment from those
            kind = "hinted" if aligned else "tiles"
            yield (
                f"block_attention {kind} {short} D={width} rows={rows} options={options}",
                block_attention_tiles_kernel,
                types,
                {**sizes, **flags, **tiles},
                {**launch, **FUSION},
            )
    types = dict.fromkeys(("part_ptr", "best_ptr", "total_ptr"), "*fp32")
    types |= {"lengths_ptr": "*i64", "out_ptr": "*bf16"}
    shape = combine_shape(256)
    yield (
        "block_attention combine",
        block_attention_combine_kernel,
        types,
        {
            **{"D": 256, "D_PAD": 256, "HAS_WINDOW": True, "CHAINED": True},
            **{"BLOCK_R": shape["BLOCK_R"], "PDL": False},
        },
        {"num_warps": shape["num_warps"], **FUSION},
    )
