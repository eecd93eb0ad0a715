"""The parts of the GPU driver that need no GPU: what it reads, concludes and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cllm_kernels._backend import registered
from tests.gpu import run
from tests.gpu.launches import LAUNCHES
from tests.gpu.parsing import junit_counts, launch_lines, sanitizer_report

ROOT = Path(__file__).parents[2]
BAR = "========="

MEMCHECK = f"""{BAR} COMPUTE-SANITIZER
{BAR} Invalid __global__ write of size 4 bytes
{BAR}     at step_kernel(long *, int)+0x160 in jacobi_step.cu:6
{BAR}     by thread (0,0,0) in block (0,0,0)
{BAR}     Address 0x7f8764 is out of bounds
{BAR}     Saved host backtrace up to driver entry point at kernel launch time
{BAR}         Host Frame: cuLaunchKernel [0x24d0]
{BAR} Invalid __global__ write of size 4 bytes
{BAR}     at void <unnamed>::step_kernel(long *, int)+0x160 in jacobi_step.cu:6
{BAR}     by thread (1,0,0) in block (0,0,0)
{BAR} Invalid __global__ read of size 2 bytes
{BAR}     at 0xd0 in linear_argmax/triton_kernel.py:40:linear_argmax_tiles_kernel
{BAR}     by thread (5,0,0) in block (1,0,0)
{BAR} ERROR SUMMARY: 3 errors
"""
RACECHECK = f"""{BAR} COMPUTE-SANITIZER
{BAR} Error: Race reported between Write access at consistency_kernel<float>(float *)+0x88 in c.cu:9
{BAR}     and Read access at consistency_kernel<float>(float *)+0xf0 in c.cu:12 [96 hazards]
{BAR}
{BAR} RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = f"""{BAR} COMPUTE-SANITIZER
{BAR} Uninitialized __global__ memory read of size 4 bytes
{BAR}     at row_argmax_reduce_kernel+0xf0 in triton_kernel.py:70
{BAR}     by thread (0,0,0) in block (0,0,0)
{BAR} ERROR SUMMARY: 1 error
"""
CLEAN = f"{BAR} COMPUTE-SANITIZER\n{BAR} ERROR SUMMARY: 0 errors\n"

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.kernels.test_a" name="test_one[cuda]"/>
<testcase classname="tests.kernels.test_a" name="test_two"><skipped message="no nvcc"/></testcase>
<testcase classname="tests.kernels.test_a" name="test_four"><skipped message="no nvcc"/></testcase>
<testcase classname="tests.kernels.test_b" name="test_x"><failure>text</failure></testcase>
<testcase classname="tests.kernels.test_b" name="test_y"><error message="m">text</error></testcase>
</testsuite></testsuites>"""


def test_memcheck_findings_are_counted_by_kernel():
    report = sanitizer_report(MEMCHECK)
    assert report["errors"] == 3
    assert [(one["kernel"], one["count"]) for one in report["findings"]] == [
        ("step_kernel", 2),
        ("linear_argmax_tiles_kernel", 1),
    ]
    assert report["findings"][0]["message"] == "Invalid __global__ write of size 4 bytes"


def test_race_and_init_findings_name_their_kernel():
    race = sanitizer_report(RACECHECK)
    assert race["errors"] == 1 and len(race["findings"]) == 1
    assert race["findings"][0]["kernel"] == "consistency_kernel<float>"
    init = sanitizer_report(INITCHECK)
    assert init["errors"] == 1
    assert init["findings"][0]["kernel"] == "row_argmax_reduce_kernel"


def test_a_log_without_a_summary_is_no_clean_log():
    assert sanitizer_report(CLEAN) == {"errors": 0, "findings": []}
    assert sanitizer_report("")["errors"] is None
    cut_off = MEMCHECK.split("Address")[0]
    assert sanitizer_report(cut_off)["errors"] is None
    assert sanitizer_report(cut_off)["findings"]


def test_junit_counts():
    counts = junit_counts(JUNIT)
    assert {name: counts[name] for name in ("passed", "failed", "errors", "skipped")} == {
        "passed": 1,
        "failed": 1,
        "errors": 1,
        "skipped": 2,
    }
    assert counts["not_passed"] == ["tests.kernels.test_b::test_x", "tests.kernels.test_b::test_y"]
    assert counts["skip_reasons"] == {"no nvcc": 2}


def test_pytest_writes_what_is_counted(tmp_path):
    """The real report of a real run, not only the one written above."""
    (tmp_path / "test_small.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_skipped(): pytest.skip('why')\n"
    )
    report = tmp_path / "junit.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(tmp_path)],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    counts = junit_counts(report.read_text())
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["not_passed"] == ["test_small::test_bad"]


def test_launch_lines_among_other_output():
    text = 'a warning\n{"op": "row_argmax", "backend": "triton", "case": "x", "error": null}\n'
    assert launch_lines(text) == [
        {"op": "row_argmax", "backend": "triton", "case": "x", "error": None}
    ]


def record(**changes):
    tool = {"complete": True, "errors": 0, "raised": [], "findings": [], "launches": 3}
    tests = {"exit_status": 0, "passed": 5, "failed": 0, "errors": 0, "skipped": 0}
    return {"tests": tests, "sanitizer": {name: dict(tool) for name in run.TOOLS}} | changes


def test_only_a_complete_run_without_findings_is_clean():
    assert run.clean(record())
    assert not run.clean(record(tests={"exit_status": 1, "passed": 5}))
    assert not run.clean(record(tests={"exit_status": 0, "passed": 0}))  # nothing but skips
    assert not run.clean(record(sanitizer={}))
    for change in ({"errors": 1}, {"complete": False}, {"raised": [{"error": "x"}]}):
        broken = record()
        broken["sanitizer"]["racecheck"] |= change
        assert not run.clean(broken), change


def test_the_summary_names_kernels():
    broken = record()
    broken["sanitizer"]["memcheck"] |= sanitizer_report(MEMCHECK)
    text = "\n".join(run.summary(broken))
    assert "memcheck: 3 errors over 3 launches" in text
    assert "2 x step_kernel: Invalid __global__ write of size 4 bytes" in text


def test_every_op_is_launched():
    assert set(registered()) <= set(LAUNCHES)


def test_without_a_gpu_it_says_so_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / "run.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "test-gpu: nothing was run: torch finds no CUDA device\n"
