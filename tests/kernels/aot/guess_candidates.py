from __future__ import annotations

from triton import next_power_of_2

from cllm_kernels._triton import FUSION
from cllm_kernels.guess_candidates import MOST
from cllm_kernels.guess_candidates.triton_kernel import COLUMNS, WARPS, guess_candidates_kernel


def variants():
    types = {name: "*i64" for name in guess_candidates_kernel.arg_names if name.endswith("_ptr")}
    for count, own_second, pool, longest, weighed, slots in (
        (2, False, True, 3, True, 16),
        (2, True, True, 3, True, 32),
        (4, False, True, 8, True, 64),
        (4, True, False, 3, False, 16),
        (3, False, True, 3, False, 128),
        (2, False, True, 0, True, 4),
        (MOST, True, True, 8, True, 16),
    ):
        constants = {"COUNT": count, "OWN_SECOND": own_second, "HAS_POOL": pool, "LEAST": 1}
        constants |= {"LONGEST": longest, "WEIGHED": weighed, "SLOTS": slots, "PDL": False}
        yield (
            f"guess_candidates count={count} own_second={own_second} pool={pool} "
            f"longest={longest} weighed={weighed} slots={slots}",
            guess_candidates_kernel,
            types,
            constants | {"BLOCK": COLUMNS, "SOURCES": next_power_of_2(count + 2)},
            {"num_warps": WARPS, **FUSION},
        )
