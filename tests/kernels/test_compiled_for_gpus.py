"""GPU code compiles for GPUs that are not here, keeps its registers, and fits in shared memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cllm_kernels._backend import _triton_reason, registered

ROOT = Path(__file__).parents[2]
# The smallest shared memory that a block may have on any of these: sm_86 and sm_89 offer 99 KiB.
SHARED_LIMIT = 99 * 1024


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_triton_kernel_for_three_generations():
    if reason := _triton_reason():
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def compiled(*capabilities: str) -> list[dict]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.compile_triton", *capabilities],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        # Every launch states whether multiply-adds fuse: Triton warns where one leaves it open.
        assert "FP_FUSION" not in done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:  # one process per core: it is the suite's longest test
        parts = list(pool.map(lambda names: compiled(*names), [("80",), ("90", "100")]))
    report = [entry for part in parts for entry in part]
    assert {entry["capability"] for entry in report} == {80, 90, 100}
    in_triton = {name for name, op in registered().items() if "triton" in op.implementations}
    assert {entry["kernel"].split()[0] for entry in report} == in_triton
    spilled = [entry for entry in report if entry["spilled"]]
    assert not spilled
    too_large = [entry for entry in report if entry["shared"] > SHARED_LIMIT]
    assert not too_large


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.name
)
def test_cuda_sources_compile_without_spills(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    done = subprocess.run(
        [nvcc, "-c", "-O3", "-std=c++17", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", str(source)]
        + [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
        + ["-DCLLM_WITH_CUDA", "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 2, done.stderr  # one report per kernel and architecture
    assert set(spills) == {("0", "0")}, done.stderr
