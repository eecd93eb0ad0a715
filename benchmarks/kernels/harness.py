"""The harness of the kernel benchmarks: interleaved timing, ceilings, memory, record.

Every variant of a case is timed in turn, round by round, and the order rotates from one round to
the next, so that a machine that slows down slows all of them. Ratios are medians of per-round
ratios. On a GPU time is taken by events, behind a write that empties the L2 cache; on a CPU by the
clock, with caches as the other variants leave them.

The ceilings are measured in the same run: the rate of a large copy (bytes read and written), the
largest rate of a large matmul in the case's dtype, and, where a case has matrix products, its own.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import cllm_kernels
from benchmarks.harness import provenance, spread, write_record
from benchmarks.kernels.cases import Case, Inputs, Run, Variant, short
from benchmarks.kernels.ceilings import SLOW, Timer, add_shares, ceilings, merge
from benchmarks.kernels.memory import peak_in_child, peak_on_gpu, print_peak
from benchmarks.kernels.show import show
from cllm_kernels._backend import registered

ROUNDS = (7, 101)  # the fewest and the most, whatever the budget says
QUICK_ROUNDS = 3
SLOW_ROUNDS = 2  # what a variant slower than SLOW takes part in


@contextlib.contextmanager
def chosen(variant: Variant) -> Iterator[None]:
    """The variant's backend, if it is one of ours."""
    if variant.backend is None:
        yield
        return
    with cllm_kernels.use_backend(variant.backend):
        yield


def distance(results: Any, expected: Any) -> float:
    """The largest relative distance, |a - b| / |b| in the 2-norm, over the floating-point results.

    Results that are not floating-point must be equal: 0 or infinity.
    """
    worst = 0.0
    for ours, theirs in zip(_tuple(results), _tuple(expected), strict=True):
        if not theirs.dtype.is_floating_point:
            worst = max(worst, 0.0 if torch.equal(ours, theirs) else float("inf"))
            continue
        gap = torch.linalg.vector_norm(ours.float() - theirs.float())
        norm = torch.linalg.vector_norm(theirs.float())
        worst = max(worst, (gap / norm.clamp_min(1e-30)).item())
    return worst


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def ready(
    case: Case, inputs: Inputs, timer: Timer, skip: re.Pattern[str] | None
) -> tuple[dict[str, Run], list[dict[str, Any]]]:
    """Builds and warms up every variant that can run, and compares its results with the first's."""
    runs: dict[str, Run] = {}
    entries = []
    expected: Any = None
    for variant in case.variants:
        entry: dict[str, Any] = {
            "name": variant.name,
            "kind": variant.kind,
            "backend": variant.backend,
            "status": "measured",
            "flop": variant.flop,
            "bytes": variant.bytes,
        }
        entries.append(entry)
        if variant.unavailable:
            entry |= {"status": "unavailable", "reason": variant.unavailable}
            continue
        if skip is not None and skip.search(variant.name):
            entry |= {"status": "left out", "reason": "by --skip"}
            continue
        try:
            with chosen(variant):
                run = variant.build(inputs)
                for _ in range(2):
                    if run.prepare is not None:
                        run.prepare()
                    began = time.perf_counter()
                    results = run.call()
                    if time.perf_counter() - began > SLOW:
                        break
            if timer.cuda:
                torch.cuda.synchronize()
        except Exception as error:  # whatever a variant raises is its entry in the record
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
            continue
        entry |= run.notes
        if variant.compared:
            if expected is None:
                expected = tuple(tensor.clone() for tensor in _tuple(results))
            else:
                entry["distance"] = distance(results, expected)
                if not entry["distance"] <= case.tolerance:
                    entry |= {
                        "status": "failed",
                        "reason": f"its results lie {entry['distance']:.2g} from those of the "
                        f"first variant, more than {case.tolerance:.2g}",
                    }
                    continue
        runs[variant.name] = run
        del results
    return runs, entries


def time_rounds(
    case: Case, runs: dict[str, Run], timer: Timer, budget: float, quick: bool
) -> dict[str, list[float]]:
    """Seconds per call and round of each variant."""
    variants = [variant for variant in case.variants if variant.name in runs]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    warm: dict[str, float] = {}
    for variant in variants:
        with chosen(variant):
            warm[variant.name] = timer.start(runs[variant.name])()
    quickest = [variant for variant in variants if warm[variant.name] <= SLOW]
    one_round = sum(warm[variant.name] * runs[variant.name].calls for variant in quickest)
    rounds = QUICK_ROUNDS
    if not quick:
        rounds = int(min(max(budget / max(one_round, 1e-6), ROUNDS[0]), ROUNDS[1]))
    for number in range(rounds):
        taking_part = variants if number < SLOW_ROUNDS else quickest
        if not taking_part:
            break
        shift = number % len(taking_part)
        pending = []
        for variant in taking_part[shift:] + taking_part[:shift]:
            with chosen(variant):
                pending.append((variant.name, timer.start(runs[variant.name])))
        for name, wait in pending:
            seconds[name].append(wait())
    return seconds


def measure(case: Case, device: torch.device, options: argparse.Namespace, file: str) -> dict:
    """One case: the entries of all its variants."""
    timer = Timer(device)
    inputs = case.make_inputs(device)
    runs, entries = ready(case, inputs, timer, options.skip)
    seconds = time_rounds(case, runs, timer, options.budget, options.quick)
    peaks = {}
    if options.memory and timer.cuda:
        for variant in case.variants:
            if variant.name in runs and variant.kind != "matmuls":
                with chosen(variant):
                    peaks[variant.name] = peak_on_gpu(runs[variant.name])
    runs.clear()
    del inputs
    if options.memory and not timer.cuda:
        for variant in case.variants:
            if variant.name in seconds and variant.kind != "matmuls":
                peaks[variant.name] = peak_in_child(file, case.name, variant.name, options.quick)
    subject = seconds.get("cllm auto")
    products = [
        variant.name
        for variant in case.variants
        if variant.kind == "matmuls" and variant.name in seconds
    ]
    matmuls = min(products, key=lambda name: spread(seconds[name])["median"], default=None)
    for entry in entries:
        if entry["status"] != "measured":
            continue
        times = seconds[entry["name"]]
        entry["rounds"] = len(times)
        entry["ms"] = {name: 1e3 * value for name, value in spread(times).items()}
        if subject:
            entry["times_auto"] = spread(_ratios(times, subject))
        if matmuls:
            entry["times_matmuls"] = spread(_ratios(times, seconds[matmuls]))
        entry |= peaks.get(entry["name"], {})
    return {
        "case": case.name,
        "dtype": short(case.dtype),
        "shape": case.shape,
        "flop_floor": case.flop_floor,
        "bytes_floor": case.bytes_floor,
        "fastest_matmuls": matmuls,
        "rounds": len(subject or next(iter(seconds.values()), [])),
        "variants": entries,
    }


def _ratios(times: list[float], others: list[float]) -> list[float]:
    """Round by round, over the rounds that both took part in: slow variants leave after a few."""
    return [mine / other for mine, other in zip(times, others, strict=False)]


def folder(device: torch.device) -> str:
    """The folder of records of this device: cpu, or the GPU's name in small letters."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def arguments(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", type=re.compile, help="cases whose name matches this expression")
    parser.add_argument("--skip", type=re.compile, help="leave out variants that match this one")
    parser.add_argument("--budget", type=float, default=None, help="seconds of timing per case")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument(
        "--record",
        nargs="?",
        const="",
        help="write the record; a folder under benchmarks/results (default: the device's name)",
    )
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.budget is None:
        options.budget = 3.0 if options.device == "cuda" else 15.0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def main(
    op: str,
    cases: Callable[[torch.device, bool], list[Case]],
    file: str,
    doc: str | None,
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """The command line of a benchmark: measures its cases, shows them, and returns the record."""
    options = arguments(doc, argv)
    device = torch.device(options.device)
    if options.peak:
        print_peak(cases, *options.peak, quick=options.quick)
        return {}
    todo = [case for case in cases(device, options.quick) if _wanted(case, options.only)]
    dtypes = list(dict.fromkeys(case.dtype for case in todo))
    if device.type == "cpu" and torch.float32 not in dtypes:
        dtypes.append(torch.float32)
    torch.manual_seed(0)
    ceiling = ceilings(device, dtypes, options.quick)
    measured = []
    for case in todo:
        # Counted per function: after a few shapes torch.compile would run the rest uncompiled.
        torch._dynamo.reset()
        measured.append(measure(case, device, options, file))
    ceiling = merge(ceiling, ceilings(device, dtypes, options.quick))
    for case in measured:
        add_shares(case, ceiling, device)
    record = {
        "benchmark": f"kernels/{op}",
        "op": op,
        "device_type": device.type,
        "quick": options.quick,
        "default_backend": registered()[op].choose(device, "auto"),
        "ceilings": ceiling,
        "cases": measured,
        **provenance(options.device),
        **_versions(device),
    }
    show(record)
    if options.record is not None:
        path = write_record(record, options.record or folder(device), f"kernels_{op}")
        print(f"record: {path}")
    return record


def _wanted(case: Case, only: re.Pattern[str] | None) -> bool:
    return only is None or only.search(case.name) is not None


def _versions(device: torch.device) -> dict[str, Any]:
    versions: dict[str, Any] = {
        "isa": cllm_kernels.build_info()["isa"],
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    try:
        import triton
    except ImportError:
        return versions | {"triton": None}
    return versions | {"triton": triton.__version__}
