"""What ``compile="inductor"`` is worth on a CPU, and what it costs to compile.

Models of some families' real sizes with random weights (no download; what a forward costs does not
depend on them), batch 1. At every n: an iteration launched operation by operation and one that
inductor has compiled, in turn, beside a step of HuggingFace's greedy search; how long the first
call takes longer than the second; and after how many iterations that is won back. ``accept="one"``
makes an iteration commit exactly one token. The Llama is decoded by native layers where nothing is
compiled: there is nothing left to fuse.

    python benchmarks/decoding/inductor.py --record cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import transformers as hf
from rich.console import Console
from rich.table import Table

import cllm
from cllm.decoding.layouts import choose_layout
from cllm.decoding.support import check_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.decoding.iteration_cost import time_huggingface
from benchmarks.harness import provenance, spread, write_record

# the configurations of the published models; vocabularies as they are, tied heads too
SHAPES: dict[str, Any] = {
    "Gemma 3 270M": hf.Gemma3TextConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144,
    ),
    "Pythia 160M": hf.GPTNeoXConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=50304,
    ),
    "GPT-2 124M": hf.GPT2Config(),
    "SmolLM2 135M (native layers)": hf.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip
# prompts are of tokens below this
VOCABULARY = 30000


def random_model(config: Any, dtype: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return model


def call(model: Any, prompt: torch.Tensor, n: int, tokens: int, compile: str) -> float:
    """Seconds of an iteration."""
    out = cllm.generate(
        model, prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None, block_size=n,
        accept="one", compile=compile, return_dict_in_generate=True,
    )  # fmt: skip
    return out.decode_seconds / out.forwards


def measured(model: Any, n: int, options: argparse.Namespace) -> dict[str, Any]:
    prompt = torch.randint(5, VOCABULARY, (1, options.context))
    call(model, prompt, n, 2, "off")  # finds the layout
    choose_layout(model, check_model(model), prompt[0], n, compiled=True)  # the other
    started = time.perf_counter()
    call(model, prompt, n, options.tokens, "inductor")
    first = time.perf_counter() - started
    found: dict[str, list[float]] = {"huggingface": [], "off": [], "inductor": [], "whole": []}
    for turn in range(options.rounds):
        for name in ("off", "inductor") if turn % 2 else ("inductor", "off"):
            started = time.perf_counter()
            found[name].append(call(model, prompt, n, options.tokens, name))
            if name == "inductor":
                found["whole"].append(time.perf_counter() - started)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        found["huggingface"] += time_huggingface(model, inputs, options.tokens)
    whole = spread(found.pop("whole"))["median"]
    ratios = [a / b for a, b in zip(found["off"], found["inductor"], strict=True)]
    return {
        "n": n,
        "seconds": {name: spread(values) for name, values in found.items()},
        "speedup": spread(ratios),
        "compile_seconds": first - whole,
    }


def won_back(row: dict[str, Any]) -> str:
    """After how many iterations compiling has paid, by the median of the ratios."""
    faster = 1 - 1 / row["speedup"]["median"]
    if faster <= 0:
        return "never"
    return f"{row['compile_seconds'] / (faster * row['seconds']['off']['median']):,.0f}"


def show(record: dict[str, Any]) -> None:
    table = Table(title=f"{record['dtype']}, {record['device']}, {record['threads']} threads")
    for header in (
        "", "n", "HuggingFace, ms", "iteration, ms", "inductor, ms", "faster", "compiles, s",
        "won back after",
    ):  # fmt: skip
        table.add_column(header, justify="left" if not header else "right")
    for name, rows in record["models"].items():
        for row in rows:
            ms = {key: f"{1e3 * one['median']:.1f}" for key, one in row["seconds"].items()}
            table.add_row(
                name, str(row["n"]), ms["huggingface"], ms["off"], ms["inductor"],
                f"{row['speedup']['median']:.2f} x", f"{row['compile_seconds']:.0f}",
                won_back(row),
            )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", default="4")
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "benchmark": "decoding/inductor",
        "dtype": options.dtype,
        "context": options.context,
        "models": {},
        **provenance("cpu"),
    }
    # else the second run of this finds on disk what the first one compiled
    torch._inductor.config.force_disable_caches = True
    for name, config in SHAPES.items():
        model = random_model(config, options.dtype)
        sizes = map(int, options.sizes.split(","))
        record["models"][name] = [measured(model, n, options) for n in sizes]
        print(name, record["models"][name][0]["speedup"], flush=True)
    show(record)
    if options.record:
        print(write_record(record, options.record, f"inductor_{options.dtype}"))


if __name__ == "__main__":
    main()
