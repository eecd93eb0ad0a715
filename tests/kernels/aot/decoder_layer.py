from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.decoder_layer.triton_kernel import (
    rotary_kernel,
    silu_mul_kernel,
)
from cllm_kernels.decoder_layer.triton_low_rank import (
    largest_rank,
    low_rank_tiles_kernel,
    tile_shape,
)
from tests.kernels.aot import FLOATS


def variants():
    for short, dtype in FLOATS.items():
        names = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr")
        types = dict.fromkeys(names, f"*{short}") | {"eps": "fp32"}
        for has_norm in (False, True):
            yield (
                f"decoder_layer rotary {short} norm={has_norm}",
                rotary_kernel,
                types,
                {"HALF": 32, "BLOCK": 32, "HAS_NORM": has_norm, "PDL": False},
                {"num_warps": 1, **FUSION},
            )
        yield (
            f"decoder_layer silu_mul {short}",
            silu_mul_kernel,
            {"gate_ptr": f"*{short}", "up_ptr": f"*{short}"},
            {"BLOCK": 1024, "PDL": False},
            {"num_warps": 4, **FUSION},
        )
        names = ("x_ptr", *(f"{name}{i}_ptr" for name in ("a", "b", "out") for i in range(3)))
        types = dict.fromkeys(names, f"*{short}")
        for count, tokens, rank in ((1, 8, 24), (3, 8, 24), (3, 64, largest_rank(dtype))):
            options = tile_shape(tokens, rank, dtype)
            launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
            yield (
                f"decoder_layer low_rank tiles {short} layers={count} tokens={tokens} rank={rank}",
                low_rank_tiles_kernel,
                types,
                {"COUNT": count, "PDL": False, **options},
                {**launch, **FUSION},
            )
