"""What does an iteration over n tokens cost a large model on a GPU, beside its step of one token?

A model of LLaMA-2-7B's shape with random weights (no download; what a forward costs does not depend
on them), batch 1, CUDA graphs. At every n: the forward alone (replays of its graph, timed by
events) and the whole iteration of `cllm.generate`, host and all, and how long the host works in
one; beside them the floor, the time in which this GPU reads the weights once. Then iterations with
a gated adapter, whose windows stand twice, and over two candidates.

    python benchmarks/decoding/shape.py --record
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import cllm
from cllm.decoding import graphs
from cllm.decoding.layouts import choose_layout
from cllm.decoding.static_loop import Readback, StaticLoop
from cllm.decoding.support import check_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import provenance, spread, write_record
from benchmarks.kernels.harness import folder

# Touvron et al. 2023, arXiv 2307.09288; SmolLM2-135M's own configuration
SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
    ),
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: str, layers: int | None) -> Any:
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096))
        finally:
            torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def read_bandwidth() -> float:
    """Bytes per second that this GPU reads at most: the sum of a tensor far beyond its caches."""
    large = torch.ones(1 << 31, dtype=torch.bfloat16, device="cuda")
    best = float("inf")
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        large.sum()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return large.nbytes / best


@torch.no_grad()
def time_forward(model: Any, prompt: torch.Tensor, n: int, replays: int) -> list[float]:
    """Seconds of the captured forward over a window of n tokens, by events."""
    traits = check_model(model)
    layout = choose_layout(model, traits, prompt[0], n)
    shape: dict[str, Any] = dict(
        batch=1, slots=prompt.shape[1] + 128 + n, device=prompt.device, position_limit=None
    )
    lengths = torch.full((1,), prompt.shape[1], device=prompt.device)
    window = prompt[:, :1].expand(1, n).contiguous()
    seconds = []
    with (
        layout.applied(model),
        graphs.graphed_forward(model, traits, **shape, layout=layout) as forward,
    ):
        forward.prefill(prompt, lengths)
        for _ in range(replays + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            forward.window(window, lengths, [prompt.shape[1]])
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    graphs.forget(model)
    return seconds[3:]


@contextmanager
def host_times() -> Iterator[list[float]]:
    """Inside, the seconds that the host works in every iteration: to launch it, to read the report
    of the one before and to act on it, without the wait for that report."""
    found: list[float] = []
    waited = [0.0]
    own_iterate, own_wait = StaticLoop._iterate, Readback.wait

    def iterate(loop: StaticLoop) -> None:
        waited[0] = 0.0
        started = time.perf_counter()
        own_iterate(loop)
        found.append(time.perf_counter() - started - waited[0])

    def wait(readback: Readback) -> None:
        started = time.perf_counter()
        own_wait(readback)
        waited[0] += time.perf_counter() - started

    with (
        mock.patch.multiple(StaticLoop, _iterate=iterate),
        mock.patch.multiple(Readback, wait=wait),
    ):
        yield found


class IterationTime(NamedTuple):
    """Seconds of an iteration, and those that the host works in one, the median of a call's."""

    whole: float
    host: float


def time_iterations(
    model: Any, prompt: torch.Tensor, n: int, tokens: int, **changes: Any
) -> IterationTime:
    """Of the quickest of three whole calls; random weights accept next to nothing, and
    ``accept="one"`` makes it exactly one token.

    Args:
        changes: to the settings of the calls.
    """
    settings: dict[str, Any] = dict(
        max_new_tokens=tokens, eos_token_id=None, block_size=n, accept="one", do_sample=False,
        compile="graph", return_dict_in_generate=True, **changes,
    )  # fmt: skip
    cllm.generate(model, prompt, **settings)  # captures
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        with host_times() as host:
            out = cllm.generate(model, prompt, **settings)
        if len(host) != out.forwards:
            raise SystemExit("shape: iterations were not replays of a graph, whose time is wanted")
        found.append(IterationTime(out.decode_seconds / out.forwards, statistics.median(host)))
    graphs.forget(model)
    return min(found)


def windows(text: str) -> list[tuple[int, int, bool]]:
    """``"8,8x2,8a,8ax2"``: n, candidates, and whether an adapter guesses."""
    found = []
    for entry in text.split(","):
        sizes, _, count = entry.partition("x")
        found.append((int(sizes.removesuffix("a")), int(count or 1), sizes.endswith("a")))
    return found


def time_windows(
    model: Any, prompt: torch.Tensor, wanted: list[tuple[int, int, bool]], options: Any
) -> list[dict[str, Any]]:
    """Iterations of other kinds, as rows of the record."""
    adapter = cllm.GatedAdapter.random(model, options.rank, scale=0.01)
    found = []
    for n, candidates, gated in wanted:
        changes: dict[str, Any] = {"candidates": candidates, "adapter": adapter if gated else None}
        timed = time_iterations(model, prompt, n, options.tokens, **changes)
        rows = n * candidates * (2 if gated else 1)
        found.append(
            {"n": n, "candidates": candidates, "rank": options.rank if gated else None,
             "rows": rows, "iteration_ms": 1e3 * timed.whole, "host_us": 1e6 * timed.host}
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def time_eager(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of a step of HuggingFace's greedy search."""
    settings = dict(do_sample=False, eos_token_id=None)
    model.generate(prompt, max_new_tokens=4, **settings)
    torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(prompt, max_new_tokens=4 + tokens, **settings)
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(prompt, max_new_tokens=4, **settings)
    torch.cuda.synchronize()
    return (whole - (time.perf_counter() - started)) / tokens


def show(record: dict[str, Any]) -> None:
    table = Table(title=f"{record['shape']}, {record['dtype']}, {record['device']}")
    columns = ("n", "forward, ms", "of n = 1", "of the floor", "iteration, ms", "of n = 1")
    for column in (*columns, "host, us"):
        table.add_column(column, justify="right")
    base = record["sizes"]["1"]
    for n, row in record["sizes"].items():
        forward = row["forward_ms"]["median"]
        table.add_row(
            n,
            f"{forward:.3f}",
            f"{forward / base['forward_ms']['median']:.3f} x",
            f"{forward / record['floor_ms']:.2f} x",
            f"{row['iteration_ms']:.3f}",
            f"{row['iteration_ms'] / base['iteration_ms']:.3f} x",
            f"{row['host_us']:.0f}",
        )
    Console().print(table)
    for row in record["windows"]:
        Console().print(row)
    Console().print(
        f"floor {record['floor_ms']:.3f} ms; a step of HuggingFace {record['huggingface_ms']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-2-7b", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--sizes", default="1,2,4,8,16,32,64,128")
    parser.add_argument(
        "--windows", type=windows, default="8a,16a,8x2,8ax2,16ax2",
        help="n of further iterations; a: with an adapter, xC: over C candidates",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, default=24, help="of the adapter")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("shape: torch finds no CUDA device")
    model = random_model(options.shape, getattr(torch, options.dtype), "cuda", options.layers)
    prompt = torch.randint(5, 30000, (1, options.context), device="cuda")
    read = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    sizes: dict[str, Any] = {}
    for n in map(int, options.sizes.split(",")):
        forward = time_forward(model, prompt, n, options.replays)
        iteration = time_iterations(model, prompt, n, options.tokens)
        sizes[str(n)] = {
            "forward_ms": {k: 1e3 * v for k, v in spread(forward).items()},
            "iteration_ms": 1e3 * iteration.whole,
            "host_us": 1e6 * iteration.host,
        }
        print(n, sizes[str(n)], flush=True)
    record = {
        "benchmark": "decoding/shape",
        "shape": options.shape,
        "layers": options.layers,
        "dtype": options.dtype,
        "context": options.context,
        "weight_bytes": read,
        "floor_ms": 1e3 * read / read_bandwidth(),
        "huggingface_ms": 1e3 * time_eager(model, prompt, 24),
        "sizes": sizes,
        "windows": time_windows(model, prompt, options.windows, options),
        **provenance("cuda"),
    }
    show(record)
    if options.record:
        print(write_record(record, folder(torch.device("cuda")), f"shape_{options.shape}"))


if __name__ == "__main__":
    main()
