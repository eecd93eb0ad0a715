from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.rms_norm.triton_kernel import norm_shape, rms_norm_kernel
from tests.kernels.aot import FLOATS


def variants():
    for short in FLOATS:
        names = ("x_ptr", "weight_ptr", "out_ptr")
        types = dict.fromkeys(names, f"*{short}") | {"eps": "fp32"}
        for width in (576, 4096):
            options = norm_shape(width)
            yield (
                f"rms_norm {short} H={width}",
                rms_norm_kernel,
                types,
                {"BLOCK": options["BLOCK"], "PDL": False},
                {"num_warps": options["num_warps"], **FUSION},
            )
