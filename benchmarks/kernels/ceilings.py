"""The timer, and what this machine can do at most: a large copy, a large matmul of each dtype."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.cases import Run, short

SLOW = 10.0  # seconds: a call that takes longer is not repeated more than needed
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far


class Timer:
    """Seconds that one call of the op takes, on this device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None
        )

    def start(self, run: Run) -> Callable[[], float]:
        """Runs once; the function returned gives the seconds (and waits for a GPU)."""
        if run.prepare is not None:
            run.prepare()
        if not self.cuda:
            began = time.perf_counter()
            results = run.call()
            seconds = (time.perf_counter() - began) / run.calls
            del results
            return lambda: seconds
        self._flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run.call()
        ended.record()

        def seconds_on_gpu() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3 / run.calls

        return seconds_on_gpu


def ceilings(device: torch.device, dtypes: list[torch.dtype], quick: bool) -> dict[str, Any]:
    """Largest rates seen on this machine: a large copy, and a large matmul of each dtype."""
    timer = Timer(device)
    length = (4 << 20) if quick else (1 << 30) if timer.cuda else (256 << 20)
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * length / _best(timer, lambda to=target, what=source: to.copy_(what))
    del source, target
    largest = 256 if quick else 8192 if timer.cuda else 2048
    rates = {short(dtype): _matmul_rate(timer, dtype, largest) for dtype in dtypes}
    return {"copy_bytes_per_second": copy, "matmul_flop_per_second": rates}


def _matmul_rate(timer: Timer, dtype: torch.dtype, largest: int) -> float:
    """The best rate over square matmuls that double in size, up to a second's worth."""
    size, best = 256, 0.0
    while True:
        slowest = 0.0
        left = torch.randn(size, size, device=timer.device).to(dtype)
        # torch's CPU matmul of 16-bit numbers depends a lot on how the second operand lies
        for right in (torch.randn_like(left), torch.randn_like(left).t()):
            out = torch.empty_like(left)
            seconds = _best(timer, lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
            best = max(best, 2 * size**3 / seconds)
            slowest = max(slowest, seconds)
        size *= 2
        if size > largest or 8 * slowest > 1.0:
            return best


def _best(timer: Timer, call: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    run = Run(call)
    timer.start(run)()
    began, seconds = time.perf_counter(), []
    while len(seconds) < 3 or (len(seconds) < 20 and time.perf_counter() - began < 1.0):
        seconds.append(timer.start(run)())
    return min(seconds)


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The larger of each rate: ceilings are measured before and after the cases."""
    name, rates = "copy_bytes_per_second", "matmul_flop_per_second"
    return {
        name: max(first[name], second[name]),
        rates: {dtype: max(rate, second[rates][dtype]) for dtype, rate in first[rates].items()},
    }


def _products(dtype: str, device: torch.device) -> tuple[str, ...]:
    """The dtypes in which a case's products may run: 16-bit numbers on a CPU in fp32 too."""
    return (dtype, "fp32") if device.type == "cpu" else (dtype,)


def add_shares(case: dict[str, Any], ceiling: dict[str, Any], device: torch.device) -> None:
    """The share of the measured ceilings that each variant reaches, at the case's floors."""
    copy = ceiling["copy_bytes_per_second"]
    rates = ceiling["matmul_flop_per_second"]
    matmul = max(rates[dtype] for dtype in _products(case["dtype"], device))
    for entry in case["variants"]:
        if entry["status"] != "measured":
            continue
        seconds = entry["ms"]["median"] / 1e3
        flop, moved = case["flop_floor"], case["bytes_floor"]
        if entry["kind"] == "matmuls":
            flop, moved = entry["flop"], entry["bytes"]
        entry["flop_per_second"] = entry["flop"] / seconds
        entry["bytes_per_second"] = entry["bytes"] / seconds
        entry["share"] = {
            "copy": moved / seconds / copy,
            "matmul": flop / seconds / matmul,
            "floor": max(moved / copy, flop / matmul) / seconds,
        }
