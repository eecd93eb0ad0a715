from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.jacobi_step.triton_kernel import jacobi_step_kernel


def variants():
    types = {name: "*i64" for name in jacobi_step_kernel.arg_names if name.endswith("_ptr")}
    types["done_ptr"] = "*u8"
    for block_mode, slots in ((False, 16), (True, 16), (True, 1024)):
        constants = {"BLOCK_MODE": block_mode, "ACCEPT_ONE": False, "HAS_FILL": True, "PDL": False}
        yield (
            f"jacobi_step block={block_mode} slots={slots}",
            jacobi_step_kernel,
            types,
            constants | {"SLOTS": slots},
            {"num_warps": 1 if slots <= 256 else 4, **FUSION},
        )
