from __future__ import annotations

from cllm_kernels._triton import FUSION
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES
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
}
NUMBERS = ("inverse_temperature", "beta", "smoothing", "softcap")


def variants():
    options = launch_options(128256)
    block = {"BLOCK": options.pop("BLOCK")}
    for short in FLOATS:
        for divergence, name in enumerate(DIVERGENCES):
            # Everything at once for the default, the leanest for the others.
            full = name == "forward_kl" or short == "bf16"
            flags = ("HAS_LABELS", "HAS_CAP", "HAS_TEMPERATURE", "TEACHER_GRADIENT")
            constants = dict.fromkeys(flags, full) | {"STUDENT_GRADIENT": True}
            types = {"student_ptr": f"*{short}", "teacher_ptr": f"*{short}", **POINTERS}
            yield (
                f"linear_consistency_loss {name} {short} full={full}",
                consistency_chunk_kernel,
                types | dict.fromkeys(NUMBERS, "fp32"),
                {"DIVERGENCE": divergence, **constants, **block},
                {**options, **FUSION},
            )
