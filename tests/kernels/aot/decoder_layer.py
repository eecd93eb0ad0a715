from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.decoder_layer.triton_kernel import (
    rotary_kernel,
    silu_mul_kernel,
)
from cllm_kernels.decoder_layer.triton_low_rank import expand_tiles_kernel, tile_shape
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
        names = [name for name in expand_tiles_kernel.arg_names if name.endswith("_ptr")]
        for count, swiglu, add, tokens in (
            *((3, False, False, 8), (1, True, False, 16), (1, False, True, 16)),
            *((3, False, False, 64), (1, True, False, 64)),
        ):
            options = tile_shape(tokens, dtype)
            launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
            yield (
                f"decoder_layer expand tiles {short} layers={count} swiglu={swiglu} add={add} "
                f"tokens={tokens}",
                expand_tiles_kernel,
                dict.fromkeys(names, f"*{short}"),
                {"COUNT": count, "SWIGLU": swiglu, "HAS_ADD": add, "PDL": False, **options},
                {**launch, **FUSION},
            )
