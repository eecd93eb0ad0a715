"""The same tests in other processes: Triton's interpreter, and the CPU kernels for lesser CPUs.

Both are chosen once per process: Triton decides at its import whether to interpret, the native
module at its first call which instructions to use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cllm_kernels  # noqa: F401  registers the ops
from cllm_kernels._backend import _triton_reason, registered
from cllm_kernels._native import missing_reason

FOLDER = Path(__file__).parent
FILES = sorted({path.name for name in registered() for path in FOLDER.glob(f"test_{name}*.py")})


def run_tests(selection: str, files: list[str], **environment: str) -> None:
    variables = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
        + [str(FOLDER / name) for name in files],
        env=variables | environment,
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "op", sorted(name for name, op in registered().items() if "triton" in op.implementations)
)
def test_triton_kernels_in_the_interpreter(op):
    if reason := _triton_reason():
        pytest.skip(reason)
    files = [name for name in FILES if name.startswith(f"test_{op}")]
    run_tests("triton-cpu", files, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])  # by name: without its bf16 products
def test_cpu_kernels_for_lesser_cpus(isa):
    if reason := missing_reason():
        pytest.skip(reason)
    run_tests("cpp-cpu or bits_are_its_own", FILES, CLLM_KERNELS_ISA=isa)


def test_the_choice_of_instructions_is_reported():
    if reason := missing_reason():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", "import cllm_kernels; print(cllm_kernels.build_info()['isa'])"],
        env=os.environ | {"CLLM_KERNELS_ISA": "scalar"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "scalar"
