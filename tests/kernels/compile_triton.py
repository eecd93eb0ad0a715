"""Compiles every Triton kernel ahead of time, for GPUs that need not be here; prints JSON.

A script rather than a test, because it must run where Triton was not imported to interpret. What is
compiled stands in tests/kernels/aot/, one module per op.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tests.kernels import aot


def variants():
    """Those of every module of aot."""
    for module in pkgutil.iter_modules(aot.__path__):
        yield from import_module(f"{aot.__name__}.{module.name}").variants()


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


def compiled(
    label: str, kernel: Any, types: dict, constants: dict, launch: dict, capability: int, kind: str
) -> dict:
    """What one variant became.

    Args:
        kind: "aligned": pointers, sizes and strides are multiples of 16; "unaligned": none is;
            "ones": every integer that may be is 1, which the launcher makes a constant.
    """
    if "PDL" in constants:  # as `_triton.chained` launches it there
        constants = {**constants, "PDL": capability >= 90}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in names}
    if kind == "ones":
        open_ = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        ones = [name for name in names if signature[name] == "i32" and name not in open_]
        constants = {**constants, **dict.fromkeys(ones, 1)}
        signature = {name: of for name, of in signature.items() if name not in ones}
    # What the launcher tells the compiler of 16-byte aligned pointers and of sizes and strides that
    # 16 divides; a hidden size of 100, say, takes the other variant.
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, of in signature.items()
        if kind == "aligned" and of != "fp32"
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    return {
        "kernel": f"{label} {kind}",
        "capability": capability,
        "shared": made.metadata.shared,
        "spilled": spilled_bytes(made.asm["ptx"], capability),
    }


def main(capabilities: list[int]) -> None:
    # Without alignment loads differ, but hardly from one GPU to the next, and only kernels that
    # hold tiles have registers to lose by it.
    targets = [(capability, "aligned") for capability in capabilities]
    targets += [(80, "unaligned"), (80, "ones")] if 80 in capabilities else []
    report = []
    for capability, kind in targets:
        seen: set[tuple] = set()
        for label, kernel, *rest in variants():
            if kind == "unaligned" and "tiles" not in label:
                continue
            # one of each way through a kernel will do
            switches = {name for name, value in rest[1].items() if value is True}
            if kind == "ones" and (kernel.__name__, *sorted(switches)) in seen:
                continue
            seen.add((kernel.__name__, *sorted(switches)))
            report.append(compiled(label, kernel, *rest, capability, kind))
    print(json.dumps(report))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
