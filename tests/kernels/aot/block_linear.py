from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.block_linear.triton_kernel import block_linear_tiles_kernel, tile_shape

POINTERS = [name for name in block_linear_tiles_kernel.arg_names if name.endswith("_ptr")]
# (outputs, swiglu, turned, bias, add)
KINDS = [(1, False, False, False, True, False), (3, False, False, True, False, False)]
KINDS += [(1, True, False, False, False, False), (3, False, True, False, False, False)]
# with one weight more
KINDS += [(3, False, False, True, False, True), (1, False, False, False, False, True)]
# rows, columns, inputs: each size and length of layer, with few rows and with many
SHAPES = [(1, 4096, 4096), (64, 4096, 4096), (64, 576, 576)]
MORE = [(1, 4096, 4096), (64, 4096, 4096), (64, 576, 1536)]
LONG = [(16, 4096, 11008), (64, 4096, 11008), (16, 576, 1536), (64, 576, 1536)]


def variants():
    for count, swiglu, turned, bias, add, more in KINDS:
        shapes = SHAPES if swiglu or turned else MORE if more else SHAPES + LONG
        for rows, columns, width in shapes:
            shape = tile_shape(
                *(rows, columns, width), swiglu=swiglu, turned=turned, shared=99 * 1024
            )
            launch = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
            even = width % shape["BLOCK_K"] == 0
            # the first in the other type, too
            first = (rows, columns, width) == SHAPES[0]
            for short in ("bf16", "fp16")[: 1 + first]:
                kind = f"outputs={count} swiglu={swiglu} turned={turned} more={more}"
                yield (
                    # launched on aligned operands only
                    f"block_linear {short} [{rows}, {width}] to {columns} {kind}",
                    block_linear_tiles_kernel,
                    {name: f"*{short}" for name in POINTERS},
                    {
                        "COUNT": count,
                        "SWIGLU": swiglu,
                        "HALF": (64 if width == 4096 else 32) * turned,
                        "HAS_BIAS": bias,
                        "HAS_ADD": add,
                        "HAS_MORE": more,
                        "EVEN_N": even,
                        "EVEN_K": even,
                        "PDL": False,
                        **shape,
                    },
                    {**launch, **FUSION},
                )
