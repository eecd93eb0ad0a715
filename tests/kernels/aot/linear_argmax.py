from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.linear_argmax.triton_kernel import (
    linear_argmax_reduce_kernel,
    linear_argmax_tiles_kernel,
    tile_shape,
)
from tests.kernels.aot import FLOATS

# Decoding's few rows, and the largest tiles.
TILES = (
    *(("bf16", 16, True), ("bf16", 128, True), ("bf16", 128, False)),
    *(("fp16", 16, True), ("fp32", 64, True)),
)


def variants():
    for short, rows, noisy in TILES:
        shape = tile_shape(rows, FLOATS[short], roomy=not noisy)
        tiles = {k: v for k, v in shape.items() if k.startswith("BLOCK")}
        launch = {k: v for k, v in shape.items() if not k.startswith("BLOCK")}
        types = {
            "hidden_ptr": f"*{short}",
            "weight_ptr": f"*{short}",
            "bias_ptr": "*fp32",
            "seed_ptr": "*i64",
            "noise_row_ptr": "*i64",
            "position_ptr": "*i64",
            "softcap": "fp32",
            "scale": "fp32",
            "value_ptr": "*fp32",
            "index_ptr": "*i32",
        }
        yield (
            # The tile of 128 rows is launched on aligned operands only.
            f"linear_argmax {'tiles' if noisy else 'large'} {short} rows={rows} noise={noisy}",
            linear_argmax_tiles_kernel,
            types,
            {"HAS_BIAS": True, "HAS_CAP": True, "HAS_NOISE": noisy, "PDL": False, **tiles},
            {**launch, **FUSION},
        )
    types = {
        "tile_value_ptr": "*fp32",
        "tile_index_ptr": "*i32",
        "index_ptr": "*i64",
        "value_ptr": "*fp32",
    }
    yield (
        "linear_argmax reduce",
        linear_argmax_reduce_kernel,
        types,
        {"BLOCK": 256, "PDL": False},
        {"num_warps": 4, **FUSION},
    )
