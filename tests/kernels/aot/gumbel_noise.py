from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.gumbel_noise.triton_kernel import COLUMNS, WARPS, gumbel_noise_kernel


def variants():
    types = {name: "*i64" for name in ("seed_ptr", "row_ptr", "position_ptr")}
    yield (
        "gumbel_noise",
        gumbel_noise_kernel,
        types | {"noise_ptr": "*fp32"},
        {"COLUMNS": COLUMNS},
        {"num_warps": WARPS, **FUSION},
    )
