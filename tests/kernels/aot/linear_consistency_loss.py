from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.linear_consistency_loss.chunk import Stage
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES, STATE_FIELDS
from cllm_kernels.linear_consistency_loss.triton_kernel import (
    consistency_chunk_kernel,
    launch_options,
)
from tests.kernels.aot import FLOATS

POINTERS = {
    "weight_ptr": "*fp32",
    "label_ptr": "*i64",
    "scale_ptr": "*fp32",
    "consistency_ptr": "*fp32",
    "cross_entropy_ptr": "*fp32",
    "state_ptr": "*fp64",
}
NUMBERS = ("inverse_temperature", "beta", "smoothing", "softcap")


def variants():
    options = launch_options(128256)
    block = {"BLOCK": options.pop("BLOCK"), "FIELDS": STATE_FIELDS}
    for short in FLOATS:
        types = {"student_ptr": f"*{short}", "teacher_ptr": f"*{short}", **POINTERS}
        types |= dict.fromkeys(NUMBERS, "fp32")
        for divergence, name in enumerate(DIVERGENCES):
            # Everything at once in bf16 and for the default, the leanest of the others.
            full = name == "forward_kl" or short == "bf16"
            flags = ("HAS_LABELS", "HAS_CAP", "HAS_TEMPERATURE", "TEACHER_GRADIENT")
            constants = dict.fromkeys(flags, full) | {"STUDENT_GRADIENT": True}
            # The other stages are parts of the whole; in one type they stand for all.
            stages = Stage if (short, name) == ("bf16", "jsd") else [Stage.WHOLE]
            for stage in stages:
                yield (
                    f"linear_consistency_loss {name} {short} full={full} {stage.name}",
                    consistency_chunk_kernel,
                    types,
                    {"DIVERGENCE": divergence, "STAGE": int(stage), **constants, **block},
                    {**options, **FUSION},
                )
