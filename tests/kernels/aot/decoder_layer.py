from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.decoder_layer.triton_kernel import (
    norm_shape,
    rms_norm_kernel,
    rotary_kernel,
    silu_mul_kernel,
)
from tests.kernels.aot import FLOATS


def variants():
    for short in FLOATS:
        names = ("x_ptr", "add_ptr", "weight_ptr", "sum_ptr", "out_ptr")
        types = dict.fromkeys(names, f"*{short}") | {"eps": "fp32"}
        for width in (576, 4096):
            options = dict(norm_shape(width))
            for has_add in (False, True):
                yield (
                    f"decoder_layer norm {short} H={width} add={has_add}",
                    rms_norm_kernel,
                    types,
                    {"HAS_ADD": has_add, "BLOCK": options["BLOCK"]},
                    {"num_warps": options["num_warps"], **FUSION},
                )
        names = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr")
        types = dict.fromkeys(names, f"*{short}") | {"eps": "fp32"}
        for has_norm in (False, True):
            yield (
                f"decoder_layer rotary {short} norm={has_norm}",
                rotary_kernel,
                types,
                {"HALF": 32, "BLOCK": 32, "HAS_NORM": has_norm},
                {"num_warps": 1, **FUSION},
            )
        yield (
            f"decoder_layer silu_mul {short}",
            silu_mul_kernel,
            {"gate_ptr": f"*{short}", "up_ptr": f"*{short}"},
            {"BLOCK": 1024},
            {"num_warps": 4, **FUSION},
        )
