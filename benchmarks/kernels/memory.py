"""The most memory that a variant holds beyond its inputs, and beyond its inputs and results.

On a GPU torch's allocator counts. On a CPU a process of its own is asked, because what other
variants left behind would count too: its peak resident memory over a second call, less what was
resident before the first, with all imports and a small call behind it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cllm_kernels
from benchmarks.kernels.cases import Case, Run, Variant

ROOT = Path(__file__).parents[2]
# glibc keeps freed memory for the next caller, which would hide it from the peak: with these every
# block of 64 KiB or more is the kernel's again as soon as it is freed.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Several threads would each keep an arena, and give it back when they like.
RETURN_MEMORY["MALLOC_ARENA_MAX"] = "1"


def result_bytes(results: Any) -> int:
    """Bytes of storage that the results hold."""
    tensors = results if isinstance(results, tuple) else (results,)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def _entry(peak: int, results: Any) -> dict[str, int]:
    held = result_bytes(results)
    return {
        "peak_bytes": peak,
        "result_bytes": held,
        "peak_bytes_beyond_results": max(0, peak - held),
    }


def peak_on_gpu(run: Run) -> dict[str, int]:
    """The peak of one call of a variant that is warmed up."""
    if run.prepare is not None:
        run.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run.call()
    torch.cuda.synchronize()
    return _entry(torch.cuda.max_memory_allocated() - before, results)


def peak_in_child(file: str, case: str, variant: str, quick: bool) -> dict[str, Any]:
    """The peak of one call on the CPU, in a process of its own; or why there is none."""
    command = [sys.executable, file, "--device", "cpu", "--peak", case, variant]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        env={**os.environ, **RETURN_MEMORY},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"peak_bytes": None, "peak_reason": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def _find(cases: list[Case], case: str, variant: str) -> tuple[Case, Variant]:
    found = next(entry for entry in cases if entry.name == case)
    return found, next(entry for entry in found.variants if entry.name == variant)


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was last reset), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def print_peak(
    cases: Callable[[torch.device, bool], list[Case]], case: str, variant: str, *, quick: bool
) -> None:
    """What the child process does: prints the peak of this variant as one line of JSON."""
    device = torch.device("cpu")
    found, wanted = _find(cases(device, quick), case, variant)
    small = cases(device, True)
    same_dtype = [entry for entry in small if entry.dtype == found.dtype] or small
    torch.manual_seed(0)
    with cllm_kernels.use_backend(wanted.backend or "auto"):
        # Imports, thread pools and compilers, on a small case.
        _, tiny = _find(small, same_dtype[0].name, variant)
        _once(tiny.build(same_dtype[0].make_inputs(device)))
        inputs = found.make_inputs(device)
        gc.collect()
        before = resident("VmRSS")
        run = wanted.build(inputs)
        _once(run)  # compiles for this shape, where the variant compiles
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        results = _once(run)
        peak = resident("VmHWM") - before
    notes = {f"peak_{name}": value for name, value in run.notes.items()}
    print(json.dumps(_entry(max(0, peak), results) | notes))


def _once(run: Run) -> Any:
    if run.prepare is not None:
        run.prepare()
    return run.call()
