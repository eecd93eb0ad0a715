"""What block_linear's C++ does with memory, in a process of its own, whose limit can be set."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cllm_kernels._native import missing_reason

START = """
import resource, torch
from cllm_kernels import block_linear, use_backend
use_backend("cpp")
page = resource.getpagesize()
def pages(which):
    return int(open("/proc/self/statm").read().split()[which]) * page
# 32 or 64 fp32 numbers of scratch for 32 or 33 of 16 bits, 64 or 128 MiB
x, weight = torch.zeros(1 << 19, 33, dtype=torch.float16), torch.ones(1, 33, dtype=torch.float16)
block_linear(x[:4], weight)
"""


def run(script):
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    if reason := missing_reason():
        pytest.skip(reason)
    command = [sys.executable, "-c", START + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "call", ["block_linear(x, weight)", "block_linear(x[:, 1:], weight[:, 1:])"]
)
def test_no_memory_is_an_error(call):
    """Not the end of the process; the next call finds everything as it should be."""
    out = run(
        f"""
limit = pages(0) + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    {call}
except MemoryError:
    print("MemoryError", block_linear(x[:1] + 1, weight).item())
"""
    )
    assert out.split() == ["MemoryError", "33.0"]


def test_much_scratch_is_given_back():
    out = run(
        """
before = pages(1)
block_linear(x, weight)
print(pages(1) - before)
"""
    )
    assert int(out) < 32 << 20
