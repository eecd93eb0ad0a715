from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.row_argmax.triton_kernel import (
    row_argmax_pieces_kernel,
    row_argmax_reduce_kernel,
)
from tests.kernels.aot import FLOATS


def variants():
    for short in FLOATS:
        types = {"logits_ptr": f"*{short}", "value_ptr": "*fp32", "index_ptr": "*i32"}
        yield (
            f"row_argmax pieces {short}",
            row_argmax_pieces_kernel,
            types,
            {"BLOCK": 2048},
            {"num_warps": 8, **FUSION},
        )
        types = {
            "logits_ptr": f"*{short}",
            "piece_value_ptr": "*fp32",
            "piece_index_ptr": "*i32",
            "index_ptr": "*i64",
            "value_ptr": f"*{short}",
        }
        yield (
            f"row_argmax reduce {short}",
            row_argmax_reduce_kernel,
            types,
            {"BLOCK": 128},
            {"num_warps": 1, **FUSION},
        )
