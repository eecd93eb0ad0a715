from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.block_linear.triton_kernel import (
    block_linear_tiles_kernel,
    tile_shape,
)
from tests.kernels.aot import FLOATS

POINTERS = [name for name in block_linear_tiles_kernel.arg_names if name.endswith("_ptr")]
# (outputs, swiglu, turned, bias, add)
KINDS = [
    (1, False, False, False, True),
    (3, False, False, True, False),
    (1, True, False, False, False),
]
KINDS += [(3, False, True, False, False)]


def variants():
    for short in FLOATS:
        if short == "fp32":
            continue
        for count, swiglu, turned, bias, add in KINDS:
            for rows, width, even in ((1, 4096, True), (64, 576, False), (64, 11008, True)):
                shape = tile_shape(
                    *(rows, 4096, width), swiglu=swiglu, turned=turned, shared=99 * 1024
                )
                launch = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
                for early in (False, True):
                    kind = (
                        f"outputs={count} swiglu={swiglu} turned={turned} rows={rows} early={early}"
                    )
                    yield (
                        f"block_linear {short} {kind}",  # launched on aligned operands only
                        block_linear_tiles_kernel,
                        {name: f"*{short}" for name in POINTERS},
                        {
                            "COUNT": count,
                            "SWIGLU": swiglu,
                            "HALF": 64 * turned,
                            "HAS_BIAS": bias,
                            "HAS_ADD": add,
                            "EVEN_N": even,
                            "EVEN_K": even,
                            "PDL": early,
                            **shape,
                        },
                        {**launch, **FUSION},
                    )
