"""What reading a prompt costs: native layers in pieces, beside the model's own forward.

A `BlockForward` reads each prompt both ways in turn, up to keys and values in its cache; its own
forward goes on to the logits of the last token, as it does where it has to.

    python benchmarks/decoding/prefill.py --dtype bfloat16 --record cpu
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

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load, provenance, spread, write_record
from cllm.decoding.forward import BlockForward
from cllm.decoding.layouts import choose_layout
from cllm.decoding.support import check_model

# tokens behind the prompt that the cache has room for
ROOM = 96


@torch.no_grad()
def measured(model: Any, prompt: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds of both ways to read `prompt` [1, P], and their ratio by round."""
    traits = check_model(model)
    layout = choose_layout(model, traits, prompt[0], rows=8)
    lengths = torch.tensor([prompt.shape[1]])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with layout.applied(model):
        for number in range(rounds + 1):
            for native in (True, False):
                forward = BlockForward(
                    model, traits, batch=1, slots=prompt.shape[1] + ROOM, device=prompt.device,
                    position_limit=traits.context, layout=layout,
                )  # fmt: skip
                if forward.walk is None:
                    raise SystemExit(f"{type(model).__name__} has no native layers here")
                if not native:
                    forward.walk = None
                started = time.perf_counter()
                forward.prefill(prompt, lengths)
                if number:  # the first round warms up
                    seconds[native].append(time.perf_counter() - started)
    pairs = zip(seconds[True], seconds[False], strict=True)
    return {
        "tokens": prompt.shape[1],
        "native_ms": spread([1e3 * one for one in seconds[True]]),
        "own_ms": spread([1e3 * one for one in seconds[False]]),
        "ratio": spread([native / own for native, own in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; default: the demo's model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", default="25,50,100,200,400,800,1600", help="prompts' lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    options = parser.parse_args()

    model, _ = load(options.model, options.dtype, "cpu")
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, vocabulary, (1, int(tokens)), generator=generator)
        for tokens in options.tokens.split(",")
    ]
    record = {
        "benchmark": "decoding/prefill",
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "rounds": options.rounds,
        "prompts": [measured(model, prompt, options.rounds) for prompt in prompts],
        **provenance("cpu"),
    }
    table = Table("tokens", "native, ms", "own forward, ms", "ratio", box=None)
    for one in record["prompts"]:
        medians = [one[name]["median"] for name in ("native_ms", "own_ms", "ratio")]
        table.add_row(str(one["tokens"]), *(f"{value:.2f}" for value in medians))
    Console().print(table)
    if options.record:
        print(write_record(record, options.record, f"prefill_{options.dtype}"))


if __name__ == "__main__":
    main()
