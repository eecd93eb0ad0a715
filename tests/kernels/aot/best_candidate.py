from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.best_candidate.triton_kernel import WARPS, best_candidate_kernel


def variants():
    types = {name: "*i64" for name in best_candidate_kernel.arg_names if name.endswith("_ptr")}
    for guesses, slots in ((False, 16), (True, 256)):
        yield (
            f"best_candidate guesses={guesses} slots={slots}",
            best_candidate_kernel,
            types,
            {"HAS_GUESSES": guesses, "SLOTS": slots, "PDL": False},
            {"num_warps": WARPS, **FUSION},
        )
