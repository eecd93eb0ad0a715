from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.guess_pool_add.triton_kernel import guess_pool_add_kernel


def variants():
    types = {name: "*i64" for name in guess_pool_add_kernel.arg_names if name.endswith("_ptr")}
    for slots, warps in ((16, 1), (1024, 4)):
        yield (
            f"guess_pool_add slots={slots}",
            guess_pool_add_kernel,
            types,
            {"SLOTS": slots, "PDL": False},
            {"num_warps": warps, **FUSION},
        )
