from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.guess_window.triton_kernel import COLUMNS, WARPS, guess_window_kernel


def variants():
    types = {name: "*i64" for name in guess_window_kernel.arg_names if name.endswith("_ptr")}
    for pool, longest, weighed, slots in (
        (True, 3, False, 16),
        (True, 0, False, 4),
        (False, 8, False, 256),
        (True, 8, True, 16),
        (True, 0, True, 4),
        (False, 3, True, 128),
    ):
        constants = {"HAS_POOL": pool, "LONGEST": longest, "LEAST": 2, "BLOCK": COLUMNS}
        constants["WEIGHED"] = weighed
        yield (
            f"guess_window pool={pool} longest={longest} weighed={weighed} slots={slots}",
            guess_window_kernel,
            types,
            constants | {"SLOTS": slots, "PDL": False},
            {"num_warps": WARPS, **FUSION},
        )
