"""Compiles every Triton kernel ahead of time, for GPUs that need not be here; prints JSON.

A script rather than a test, because it must run where Triton was not imported to interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from cllm_kernels._triton import FUSION
from cllm_kernels.jacobi_step.triton_kernel import jacobi_step_kernel
from cllm_kernels.linear_argmax.triton_kernel import (
    linear_argmax_reduce_kernel,
    linear_argmax_tiles_kernel,
    tile_shape,
)
from cllm_kernels.row_argmax.triton_kernel import (
    row_argmax_pieces_kernel,
    row_argmax_reduce_kernel,
)

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def variants():
    """(label, kernel, types of the pointers, compile-time arguments, launch options)."""
    pointer = "*i64"
    for block_mode, slots in ((False, 16), (True, 16), (True, 1024)):
        constants = {"BLOCK_MODE": block_mode, "ACCEPT_ONE": False, "HAS_FILL": True}
        types = {name: pointer for name in jacobi_step_kernel.arg_names if name.endswith("_ptr")}
        types["done_ptr"] = "*u8"
        yield (
            f"jacobi_step block={block_mode} slots={slots}",
            jacobi_step_kernel,
            types,
            constants | {"SLOTS": slots},
            {"num_warps": 1 if slots <= 256 else 4, **FUSION},
        )
    partial = {"value_ptr": "*fp32", "index_ptr": "*i32"}
    for short in FLOATS:
        types = {"logits_ptr": f"*{short}", **partial}
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
        # Decoding's few rows, and the largest tile.
        for rows in (16, 64) if short != "fp16" else (16,):
            shape = tile_shape(rows, FLOATS[short])
            tiles = {k: v for k, v in shape.items() if k.startswith("BLOCK")}
            launch = {k: v for k, v in shape.items() if not k.startswith("BLOCK")}
            types = {
                "hidden_ptr": f"*{short}",
                "weight_ptr": f"*{short}",
                "bias_ptr": "*fp32",
                "softcap": "fp32",
                **partial,
            }
            yield (
                f"linear_argmax tiles {short} rows={rows}",
                linear_argmax_tiles_kernel,
                types,
                {"HAS_BIAS": True, "HAS_CAP": True, **tiles},
                {**launch, **FUSION},
            )
    types = {
        "tile_value_ptr": "*fp32",
        "tile_index_ptr": "*i32",
        "index_ptr": "*i64",
        "value_ptr": "*fp32",
    }
    yield (
        "linear_argmax reduce",
        linear_argmax_reduce_kernel,
        types,
        {"BLOCK": 256},
        {"num_warps": 4, **FUSION},
    )


def spilled_bytes(ptx: str, capability: int) -> int:
    """What ptxas says of registers that did not fit, for a kernel's PTX."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target, ptx[:400]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "--fmad=false", f"--gpu-name={target[1]}"]
        command += [str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert counts, done.stderr
    return sum(map(int, counts))


def main(capabilities: list[int]) -> None:
    report = []
    # Without alignment loads differ, but hardly from one GPU to the next, and only the matmul has
    # registers to lose by it.
    targets = [(capabilities[0], False), *((capability, True) for capability in capabilities)]
    for capability, aligned in targets:
        for label, kernel, types, constants, launch in variants():
            if not aligned and "tiles" not in label:
                continue
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: types.get(name, "i32") for name in names}
            # What the launcher tells the compiler of 16-byte aligned pointers and of sizes and
            # strides that 16 divides; a hidden size of 100, say, takes the other variant.
            attributes = {
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name, kind in signature.items()
                if aligned and kind != "fp32"
            }
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options=launch)
            report.append(
                {
                    "kernel": f"{label} aligned={aligned}",
                    "capability": capability,
                    "shared": compiled.metadata.shared,
                    "spilled": spilled_bytes(compiled.asm["ptx"], capability),
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
