"""What compile_triton.py compiles: one module per op, each with a generator `variants`.

It yields (label, kernel, types of the arguments that are not int32, compile-time arguments, launch
options). A label begins with the op's name; one that contains "tiles" is compiled a second time
without the alignment that a launch usually promises.
"""

from __future__ import annotations

import torch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
