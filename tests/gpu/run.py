"""A real GPU's tests of kernels and decoding, and compute-sanitizer beside them; a dated record.

    python tests/gpu/run.py        (or: make test-gpu)

Needs torch with CUDA, triton, pytest and hypothesis; builds the native module in place if it is not
there. Writes benchmarks/results/<gpu>/tests_<date>.json. Exit status: 0 all passed and no finding,
1 something failed, was found or could not be run, 2 nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gpu.parsing import junit_counts, launch_lines, sanitizer_report

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck")
# Without torch's pool each tensor is an allocation of its own, whose ends the sanitizer knows.
WATCHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def nothing_to_run_on() -> str | None:
    """Why no test can run here, in one line; None if they can."""
    missing = [name for name in ("torch", "triton", "pytest", "hypothesis") if not find_spec(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        **{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def built() -> dict[str, Any]:
    """Builds the native module where it is missing or without CUDA; what there is afterwards."""
    question = "import cllm_kernels, json; print(json.dumps(cllm_kernels.build_info()))"

    def ask() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", question],
            env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            return {"loaded": False, "cuda": False, "cuda_reason": done.stderr.strip()[-300:]}
        return json.loads(done.stdout.splitlines()[-1])

    info = ask()
    if info["loaded"] and info["cuda"]:
        return _named(info)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {**info, "build_failure": (done.stderr or done.stdout).strip()[-600:]}
    return _named(ask())


def _named(info: dict[str, Any]) -> dict[str, Any]:
    """With the compiler's name instead of where it lies on this machine."""
    compiler = info.get("compiler")
    return info | ({"compiler": Path(compiler).name} if compiler else {})


def run_tests(scratch: Path) -> dict[str, Any]:
    report = scratch / "junit.xml"
    # by name as they end, so that a run that is cut off has said what failed; compiling takes time
    command = [sys.executable, "-m", "pytest", "tests/kernels", "tests/decoding", "-m", "gpu", "-v"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", "--timeout=300"]
    if find_spec("xdist"):  # most of the time is spent on compiling kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    status = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    if not report.exists():
        return {"exit_status": status, "error": "pytest wrote no report"}
    return {"exit_status": status, **junit_counts(report.read_text())}


def find_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(os.path.realpath(nvcc)).parents[1])] if nvcc else []
    for home in filter(None, homes):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if (Path(home) / place).is_file():
                return str(Path(home) / place)
    return shutil.which("compute-sanitizer")


def run_tool(sanitizer: str, tool: str, scratch: Path) -> dict[str, Any]:
    """One sanitizer tool over all launches."""
    log = scratch / f"{tool}.log"
    command = [sanitizer, "--tool", tool, "--log-file", str(log), "--print-limit", "1000"]
    command += ["--error-exitcode", "99", sys.executable, "tests/gpu/launches.py"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(), **WATCHED},
        capture_output=True,
        text=True,
        check=False,
    )
    report = sanitizer_report(log.read_text(errors="replace") if log.exists() else "")
    launches = launch_lines(done.stdout)
    raised = [line for line in launches if line["error"]]
    ended = done.returncode in (0, 99) and report["errors"] is not None and bool(launches)
    return {
        "exit_status": done.returncode,
        "complete": ended,
        **report,
        "launches": len(launches),
        "raised": raised,
        **({} if ended else {"output_tail": (done.stdout + done.stderr)[-1500:]}),
    }


def clean(record: dict[str, Any]) -> bool:
    """Whether every test passed and every tool ran to its end without a finding."""
    tests, tools = record["tests"], record["sanitizer"]
    return (
        tests["exit_status"] == 0
        and tests.get("passed", 0) > 0
        and set(tools) == set(TOOLS)
        and all(t["complete"] and t["errors"] == 0 and not t["raised"] for t in tools.values())
    )


def summary(record: dict[str, Any]) -> list[str]:
    tests = record["tests"]
    counts = ", ".join(
        f"{tests[name]} {name}"
        for name in ("passed", "failed", "errors", "skipped")
        if name in tests
    )
    lines = [f"tests: {counts or tests.get('error')}"]
    for tool, report in record["sanitizer"].items():
        if "reason" in report:
            lines.append(f"{tool}: {report['reason']}")
            continue
        end = "" if report["complete"] else ", did not come to its end"
        lines.append(f"{tool}: {report['errors']} errors over {report['launches']} launches{end}")
        for finding in report["findings"]:
            lines.append(f"  {finding['count']} x {finding['kernel']}: {finding['message']}")
        for line in report["raised"]:
            lines.append(f"  {line['op']} {line['backend']} {line['case']}: {line['error']}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="sanitizer tools; empty for none")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args(argv)
    if reason := nothing_to_run_on():
        print(f"test-gpu: nothing was run: {reason}")
        return 2

    import torch
    import triton

    from benchmarks.harness import provenance, write_record
    from benchmarks.kernels.harness import folder

    record: dict[str, Any] = {
        "benchmark": "tests/gpu",
        **provenance("cuda"),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability()),
        "native": built(),
        "tests": {"exit_status": None, "error": "left out by --skip-tests"},
        "sanitizer": {},
    }
    sanitizer = find_sanitizer()
    # nothing is timed, so all of it may run at once
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        tests = None if options.skip_tests else pool.submit(run_tests, Path(scratch))
        tools = list(filter(None, options.tools.split(",")))
        if sanitizer is not None:
            reports = pool.map(lambda tool: run_tool(sanitizer, tool, Path(scratch)), tools)
            record["sanitizer"] = dict(zip(tools, reports, strict=True))
        else:
            reason = "compute-sanitizer was not found (PATH, CUDA_HOME, beside nvcc)"
            missing = {"complete": False, "errors": None, "raised": [], "reason": reason}
            record["sanitizer"] = {tool: dict(missing) for tool in tools}
        if tests is not None:
            record["tests"] = tests.result()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    path = write_record(record, folder(torch.device("cuda")), f"tests_{date}")
    print("\n".join([*summary(record), f"record: {path}"]))
    return 0 if clean(record) else 1


if __name__ == "__main__":
    sys.exit(main())
