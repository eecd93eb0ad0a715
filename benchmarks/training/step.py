"""What does one optimiser step on a response cost: packed and fused, or as it was published?

Ours: one forward over `[prompt, response, noisy states]` through `cllm.patch_training`, whose loss
never holds whole logits. Theirs: three forwards and two backwards for every block, all logits kept
(`written_out.py`). Same responses, same states (one a block), one AdamW step a response, in turn.
Before anything is timed the packed loss and its gradient are compared with those of the three
forwards. Peak memory is a process's of its own, beyond weights, gradients and optimiser state.

    python benchmarks/training/step.py --record cpu
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cllm

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import provenance, spread, write_record
from benchmarks.kernels.memory import RETURN_MEMORY, resident
from benchmarks.kernels.show import size_text
from benchmarks.training import responses, written_out
from cllm.training.packed_sample import pack_sample
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledExample

CONFIG = cllm.ConsistencyConfig()  # the paper's: forward KL, ar_weight 10, one state a block
OURS, THEIRS, LEAN = "packed", "published", "packed, checkpointed"
CONTENDERS = (OURS, LEAN, THEIRS)
# How far loss and gradient may lie from the three forwards', relative: fp32 rounds sums of hundreds
# of rows in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class Trainee:
    """A model in training, with every contender's step."""

    def __init__(self, model: Any):
        self.model = model.train()
        cllm.patch_training(model, CONFIG)  # a call without a packed batch is the model's own
        self.collator = ConsistencyCollator(CONFIG)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def gradients(self, contender: str, sample: SampledExample) -> None:
        if contender == THEIRS:
            written_out.published(self.model, sample, CONFIG)
            return
        if contender == LEAN:
            with checkpointed(self.model):
                self.packed(sample)
        else:
            self.packed(sample)

    def packed(self, sample: SampledExample) -> float:
        batch = self.collator([sample])
        loss = self.model(**{k: v.to(self.model.device) for k, v in batch.items()}).loss
        loss.backward()
        return loss.item()

    def step(self, contender: str, sample: SampledExample, *, keep: bool = False) -> float:
        """Seconds of one optimiser step; `keep`: gradients keep their memory."""
        _synchronise(self.model)
        began = time.perf_counter()
        self.gradients(contender, sample)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep)
        _synchronise(self.model)
        return time.perf_counter() - began

    def compare(self, sample: SampledExample) -> dict[str, float]:
        """The packed loss and its gradient beside those of three forwards a block."""

        def run(function: Callable[[], float]) -> tuple[float, list[torch.Tensor]]:
            self.optimizer.zero_grad()
            loss = function()
            return loss, [p.grad for p in self.model.parameters() if p.grad is not None]

        ours, gradients = run(lambda: self.packed(sample))
        theirs, expected = run(lambda: written_out.counted_rows(self.model, sample, CONFIG))
        self.optimizer.zero_grad()
        gap = sum((a - b).float().square().sum() for a, b in zip(gradients, expected, strict=True))
        norm = sum(b.float().square().sum() for b in expected)
        return {
            "packed_loss": ours,
            "three_forwards_loss": theirs,
            "loss_distance": abs(ours - theirs) / abs(theirs),
            "gradient_distance": float((gap / norm) ** 0.5),
        }


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Layers keep their inputs alone for backward, and run once more there."""
    # transformers renames "gradient" to "activation" on the way to 6
    new = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def counts(samples: list[SampledExample]) -> dict[str, Any]:
    """Tokens forwarded for a response, on the average."""
    packed = [pack_sample(sample) for sample in samples]

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    ours = mean([sample.columns for sample in packed])
    theirs = mean([written_out.tokens_forwarded(sample) for sample in samples])
    return {
        "prompt_tokens": [len(sample.example.prompt) for sample in samples],
        "counted_rows": mean([len(sample.rows) for sample in packed]),
        "tokens_forwarded": {
            OURS: ours,
            "of_them_noisy": mean([sample.noisy for sample in packed]),
            THEIRS: theirs,
        },
        "tokens_forwarded_ratio": theirs / ours,
    }


def time_length(trainee: Trainee, samples: list[SampledExample], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        sample = samples[number % len(samples)]
        shift = number % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            seconds[name].append(trainee.step(name, sample))
    length = len(samples[0].example.response)
    median = {name: spread(values)["median"] for name, values in seconds.items()}
    return {
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "responses_per_second": {name: 1 / value for name, value in median.items()},
        "response_tokens_per_second": {name: length / value for name, value in median.items()},
        "gain": {
            name: spread([b / a for a, b in zip(seconds[name], seconds[THEIRS], strict=True)])
            for name in (OURS, LEAN)
        },
    }


def peak(trainee: Trainee, contender: str, sample: SampledExample) -> dict[str, int]:
    """Bytes that a step takes at most, beyond weights, gradients and optimiser state."""
    short = responses.cut(sample.example, sample.example.block_size)
    trainee.step(contender, responses.sampled(short, CONFIG), keep=True)  # allocates that state
    if contender == THEIRS:  # block after block: the last, with all text before it, takes the most
        sample = written_out.last_block(sample)
    on_gpu = trainee.model.device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    trainee.step(contender, sample, keep=True)
    most = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {"peak_bytes": max(0, most - before), "training_state_bytes": before}


def peak_in_child(options: argparse.Namespace, contender: str, file: Path) -> dict[str, Any]:
    """`peak` in a process of its own, for what other contenders leave behind would count too."""
    command = [sys.executable, __file__, "--peak", contender, str(file), "--dtype", options.dtype]
    command += ["--device", options.device]
    command += ["--tiny"] if options.tiny else []
    command += ["--model", options.model] if options.model else []
    environment = os.environ | ({} if options.device == "cuda" else RETURN_MEMORY)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SystemExit(f"--peak {contender!r} failed: {lines[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="path or hub id; default: the demo's model")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to see it run")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--lengths", default="128,256,512", help="response tokens")
    parser.add_argument("--responses", type=int, default=2, help="how many, taken in turn")
    parser.add_argument("--rounds", type=int, default=3, help="optimiser steps of each contender")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--record", default=None, help="folder under benchmarks/results")
    parser.add_argument("--plot", type=Path, default=None, help="write a picture (PNG)")
    parser.add_argument("--peak", nargs=2, metavar=("CONTENDER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def run(argv: list[str] | None = None) -> dict[str, Any]:
    options = arguments(argv)
    model, prompts = responses.model_and_prompts(
        options.model, options.tiny, options.dtype, options.device, options.responses
    )
    if options.peak:
        contender, file = options.peak
        sample = responses.sampled(responses.read(Path(file))[0], CONFIG)
        print(json.dumps(peak(Trainee(model), contender, sample)))
        return {}
    lengths = sorted(int(length) for length in options.lengths.split(","))
    examples = responses.collect(model, prompts, lengths[-1], options.block_size)
    trainee = Trainee(model)
    entries, comparison = [], {}
    for length in lengths:
        samples = [
            responses.sampled(responses.cut(example, length), CONFIG, index)
            for index, example in enumerate(examples)
        ]
        if not comparison:
            comparison = {"length": length, **trainee.compare(samples[0])}
            far = max(comparison["loss_distance"], comparison["gradient_distance"])
            if not far <= TOLERANCE[options.dtype]:
                raise SystemExit(f"the packed loss is not that of three forwards: {comparison}")
        for name in CONTENDERS:  # warm-up; of the published steps, a few blocks show all
            warm = 2 * options.block_size if name == THEIRS else length
            trainee.step(
                name, responses.sampled(responses.cut(samples[0].example, warm), CONFIG)
            )  # fmt: skip
        entry = {"length": length, **counts(samples)}
        entries.append(entry | time_length(trainee, samples, options.rounds))
    del trainee, model
    if options.memory:
        add_peaks(entries, examples, options)
    record = {
        "benchmark": "training/step",
        "model": "tiny" if options.tiny else options.model or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "block_size": options.block_size,
        "responses": options.responses,
        "comparison": comparison,
        "lengths": entries,
        **provenance(options.device),
    }
    show(record)
    if options.record:
        path = write_record(record, options.record, f"training_step_{options.dtype}")
        Console().print(f"record: {path}")
    if options.plot:
        from benchmarks.training.plots import draw

        draw(record, options.plot)
    return record


def add_peaks(entries: list[dict[str, Any]], examples: Any, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for entry in entries:
            file = Path(folder) / f"{entry['length']}.json"
            responses.save([responses.cut(examples[0], entry["length"])], file)
            found = {name: peak_in_child(options, name, file) for name in CONTENDERS}
            entry["peak_bytes"] = {name: one["peak_bytes"] for name, one in found.items()}
            entry["training_state_bytes"] = found[OURS]["training_state_bytes"]
            entry["peak_share"] = {
                name: found[name]["peak_bytes"] / max(1, found[THEIRS]["peak_bytes"])
                for name in (OURS, LEAN)
            }


def show(record: dict[str, Any]) -> None:
    console = Console(width=max(120, Console().width))
    same = record["comparison"]
    console.print(
        f"{record['model']}, {record['dtype']}, n = {record['block_size']}, {record['device']}; "
        f"at {same['length']} tokens the packed loss is {same['packed_loss']:.6f}, that of three "
        f"forwards a block {same['three_forwards_loss']:.6f}, gradients "
        f"{same['gradient_distance']:.1e} apart"
    )
    table = Table()
    names = ("length", "contender", "step, s", "responses/s", "tokens/s", "gain", "tokens", "peak")
    for column in names:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for entry in record["lengths"]:
        for name in CONTENDERS:
            time_, gain = entry["seconds"][name], entry["gain"].get(name)
            tokens = entry["tokens_forwarded"][THEIRS if name == THEIRS else OURS]
            table.add_row(
                str(entry["length"]),
                name,
                f"{time_['median']:.3g} ({time_['low']:.3g}-{time_['high']:.3g})",
                f"{entry['responses_per_second'][name]:.3g}",
                f"{entry['response_tokens_per_second'][name]:.3g}",
                f"{gain['median']:.1f} x" if gain else "",
                f"{tokens:.0f}",
                size_text(entry.get("peak_bytes", {}).get(name)),
            )
    console.print(table)


if __name__ == "__main__":
    run()
