from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.draft_window.triton_kernel import WARPS, draft_window_kernel


def variants():
    types = {name: "*i64" for name in draft_window_kernel.arg_names if name.endswith("_ptr")}
    for blocks, fill, slots in ((False, False, 16), (False, True, 256), (True, False, 64)):
        yield (
            f"draft_window blocks={blocks} fill={fill} slots={slots}",
            draft_window_kernel,
            types,
            {"BLOCK_MODE": blocks, "HAS_FILL": fill, "SLOTS": slots, "PDL": False},
            {"num_warps": WARPS, **FUSION},
        )
