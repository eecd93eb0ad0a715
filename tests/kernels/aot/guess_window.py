from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.guess_window.triton_kernel import COLUMNS, WARPS, guess_window_kernel


def variants():
    types = {name: "*i64" for name in guess_window_kernel.arg_names if name.endswith("_ptr")}
    for pool, longest, slots in ((True, 3, 16), (True, 0, 4), (False, 8, 256)):
        constants = {"HAS_POOL": pool, "LONGEST": longest, "LEAST": 2, "BLOCK": COLUMNS}
        yield (
            f"guess_window pool={pool} longest={longest} slots={slots}",
            guess_window_kernel,
            types,
            constants | {"SLOTS": slots, "PDL": False},
            {"num_warps": WARPS, **FUSION},
        )
