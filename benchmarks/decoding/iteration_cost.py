"""What does one Jacobi iteration cost, beside one step of HuggingFace's greedy ``generate``?

Jacobi decoding pays off where a forward over n rows costs about as much as one over a single row.
Both sides decode the same prompt for the same number of steps at the same context, in turn, and
every step is timed by the streamer that receives its token (``accept="one"`` makes a Jacobi
iteration commit exactly one). Two more questions are answered in the same run: how much of an
iteration is not the model's forward, and what a batch of eight is worth.

    python benchmarks/decoding/iteration_cost.py --dtype bfloat16 --record cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cllm

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import load, provenance, spread, write_record

PROMPT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May? Explain every step."
)


class StepClock:
    """A streamer that notes when each step's token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Seconds between tokens; the first two entries are the prompt and the prefill."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:])]  # noqa: B905


def time_huggingface(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> list[float]:
    clock = StepClock()
    model.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=0,
        eos_token_id=None, streamer=clock,
    )  # fmt: skip
    return clock.steps()


def time_jacobi(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int, block_size: int
) -> list[float]:
    clock = StepClock()
    cllm.generate(
        model, **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None,
        streamer=clock, block_size=block_size, accept="one",
    )  # fmt: skip
    return clock.steps()


def overhead(model: Any, inputs: dict[str, torch.Tensor], tokens: int, block_size: int) -> float:
    """Share of the decoding loop that is not the model's forward."""
    inside: list[float] = []
    started = [0.0]
    before = model.register_forward_pre_hook(lambda *_: started.__setitem__(0, time.perf_counter()))
    after = model.register_forward_hook(lambda *_: inside.append(time.perf_counter() - started[0]))
    try:
        output = cllm.generate(
            model, **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None,
            block_size=block_size, return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        before.remove()
        after.remove()
    # the prefill (and a first call's probe) come before the loop's own forwards
    return 1 - sum(inside[-output.forwards :]) / output.decode_seconds


def linear_layers(model: Any, block_size: int, *, packed: bool) -> float:
    """Seconds of one pass over all linear layers of `model` on `block_size` rows, nothing else.

    This is the floor that the vendor's matmul sets for an iteration. `packed`: with weights that
    oneDNN has laid out for this many rows beforehand, to see how much of the floor is layout.
    """
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            rows = torch.randn(block_size, module.in_features).to(weight)
            if packed:
                ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), block_size)
                calls.append(
                    (torch.ops.mkldnn._linear_pointwise, (rows, ordered, None, "none", [], ""))
                )
            else:
                calls.append((torch.nn.functional.linear, (rows, weight)))
    seconds = []
    with torch.no_grad():
        for _ in range(12):
            started = time.perf_counter()
            for function, arguments in calls:
                function(*arguments)
            seconds.append(time.perf_counter() - started)
    return spread(seconds[2:])["median"]


def tokens_per_second(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int, block_size: int
) -> float:
    started = time.perf_counter()
    output = cllm.generate(
        model, **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None,
        block_size=block_size, return_dict_in_generate=True,
    )  # fmt: skip
    return int(output.accepted.sum()) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="path or hub id; default: the demo's model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="1,4,8,16,32,64")
    parser.add_argument("--tokens", type=int, default=48, help="steps of each timed call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-block-size", type=int, default=8)
    parser.add_argument("--record", default=None, help="folder under benchmarks/results")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]

    model, tokenizer = load(options.model, options.dtype, options.device)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    inputs = dict(tokenizer(text, return_tensors="pt", add_special_tokens=False))
    inputs = {name: inputs[name].to(options.device) for name in ("input_ids", "attention_mask")}

    steps: dict[int, list[float]] = {size: [] for size in sizes}
    baseline: list[float] = []
    ratios: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(options.rounds + 1):
        ours = {size: time_jacobi(model, inputs, options.tokens, size) for size in sizes}
        theirs = time_huggingface(model, inputs, options.tokens)
        if number == 0:
            continue  # warm-up
        baseline += theirs
        for size in sizes:
            steps[size] += ours[size]
            ratios[size].append(spread(ours[size])["median"] / spread(theirs)["median"])

    shares = {
        size: spread([overhead(model, inputs, options.tokens, size) for _ in range(3)])["median"]
        for size in sizes
    }
    floors = {size: linear_layers(model, size, packed=False) for size in sizes}
    packed = {}
    if options.device == "cpu" and torch.backends.mkldnn.is_available():
        packed = {size: linear_layers(model, size, packed=True) for size in sizes}
    single, batched = [], []
    rows = {name: tensor.expand(options.batch_size, -1) for name, tensor in inputs.items()}
    for _ in range(3):
        size = options.batch_block_size
        single.append(tokens_per_second(model, inputs, options.tokens, size))
        batched.append(tokens_per_second(model, rows, options.tokens, size))
    gain = [many / one for many, one in zip(batched, single, strict=True)]

    record = {
        "benchmark": "decoding/iteration_cost",
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "context": [inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + options.tokens],
        "rounds": options.rounds,
        "huggingface_step_ms": scaled(spread(baseline)),
        "jacobi_iteration_ms": {size: scaled(spread(steps[size])) for size in sizes},
        "ratio": {size: spread(ratios[size]) for size in sizes},
        "overhead_share": shares,
        "linear_layers_ms": {size: round(1e3 * floors[size], 3) for size in sizes},
        "linear_layers_prepacked_ms": {size: round(1e3 * packed[size], 3) for size in packed},
        "batch": {
            "batch_size": options.batch_size,
            "block_size": options.batch_block_size,
            "single_tokens_per_second": spread(single),
            "batch_tokens_per_second": spread(batched),
            "gain": spread(gain),
        },
        **provenance(options.device),
    }
    show(record, sizes)
    if options.record:
        name = f"iteration_cost_{options.dtype}"
        Console().print(f"record: {write_record(record, options.record, name)}")


def scaled(statistic: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 3) for name, value in statistic.items()}


def show(record: dict[str, Any], sizes: list[int]) -> None:
    table = Table(title=f"{record['model']}, {record['dtype']}, {record['device']}")
    for column in (
        "forward",
        "ms",
        "quartiles",
        "of 1 HF step",
        "overhead",
        "linear, ms",
        "prepacked",
    ):
        table.add_column(column, justify="right")
    step = record["huggingface_step_ms"]
    table.add_row(
        "generate",
        f"{step['median']:.1f}",
        f"{step['low']:.1f}-{step['high']:.1f}",
        *[""] * 4,
    )
    for size in sizes:
        step = record["jacobi_iteration_ms"][size]
        table.add_row(
            f"n = {size}",
            f"{step['median']:.1f}",
            f"{step['low']:.1f}-{step['high']:.1f}",
            f"{record['ratio'][size]['median']:.2f} x",
            f"{100 * record['overhead_share'][size]:.1f} %",
            f"{record['linear_layers_ms'][size]:.1f}",
            f"{record['linear_layers_prepacked_ms'].get(size, float('nan')):.1f}",
        )
    console = Console()
    console.print(table)
    batch = record["batch"]
    console.print(
        f"batch of {batch['batch_size']}, n = {batch['block_size']}: "
        f"{batch['gain']['median']:.2f} x the tokens/s of single runs"
    )


if __name__ == "__main__":
    main()
