"""setup.py on machines that lack something: the build goes on, and says what is missing and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Builds the native module into a folder; its record, or {} if the build failed."""
    for package in ("setuptools", "pybind11"):
        try:
            if package == "setuptools" and int(version(package).split(".")[0]) < 77:
                pytest.skip("this environment's setuptools is older than the build needs")
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed here (pip installs it for builds)")
    clean = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "CFLAGS", "CXXFLAGS")
    variables = {
        k: v for k, v in os.environ.items() if k not in clean and not k.startswith("CLLM_")
    }
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    record = folder / "lib" / "cllm_kernels" / "_build_info.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def modules(folder: Path) -> list[Path]:
    return list((folder / "lib" / "cllm_kernels").glob("_C*"))


def test_no_compiler(tmp_path):
    done, record = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not record["cpu"] and not record["cuda"]
    assert "no-such-compiler could not be run" in record["cpu_reason"]
    assert not modules(tmp_path)
    assert "installing without the native module" in done.stderr


def test_no_compiler_where_one_is_demanded(tmp_path):
    done, record = build(tmp_path, CXX="no-such-compiler", CLLM_KERNELS_FORCE_BUILD="1")
    assert done.returncode != 0 and not record
    assert "CLLM_KERNELS_FORCE_BUILD is set and no-such-compiler could not be run" in done.stderr


def broken_nvcc(folder: Path) -> str:
    """A CUDA_HOME whose nvcc answers that it failed."""
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return str(home)


def test_a_failing_nvcc_that_is_demanded(tmp_path):
    done, _ = build(tmp_path, CUDA_HOME=broken_nvcc(tmp_path), CLLM_KERNELS_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "nvcc --list-gpu-arch failed" in done.stderr or "could not be run" in done.stderr


@pytest.mark.slow
def test_a_failing_nvcc_leaves_the_cpu_kernels(tmp_path):
    done, record = build(tmp_path, CUDA_HOME=broken_nvcc(tmp_path), CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    if not record["cpu"]:
        pytest.skip(f"no compiler here: {record['cpu_reason']}")
    assert not record["cuda"] and "nvcc --list-gpu-arch failed" in record["cuda_reason"]
    assert len(modules(tmp_path)) == 1
    shown = subprocess.run(
        [sys.executable, "-c", "import _C; print(hasattr(_C, 'jacobi_step_cuda'), _C.isa())"],
        cwd=tmp_path / "lib" / "cllm_kernels",
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("False ")
