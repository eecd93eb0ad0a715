"""What does it gain to iterate all blocks of a response at once, instead of one after the other?

Three ways to the same Jacobi trajectories of the same greedy responses, in turn: block-parallel
(`cllm.training.collect.block_parallel`); sequentially, one response at a time, an n-token forward
an iteration over a cached prefix; and sequentially by Jacobi decoding in block mode, whose rows
advance at their own pace, so that it batches. The states are compared before anything is timed.

    python benchmarks/training/collection.py --record cpu
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
from transformers import DynamicCache

import cllm
from cllm.decoding.support import check_model
from cllm.fill import fill_table
from cllm.prompts import encode, shipped_prompts
from cllm.training.collect.block_parallel import collect_states

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import load, provenance, spread, write_record

States = list[list[list[list[int]]]]  # [response][block][state][token]
SEED = 0


@torch.no_grad()
def sequential(
    model: Any, prompt: list[int], response: list[int], n: int, guess: list[int]
) -> list[list[list[int]]]:
    """Trajectories of one response, block by block: [block][state][token].

    Args:
        guess: initial guess for every token of the response.
    """
    device = model.device
    cache = DynamicCache()
    kept = {check_model(model).cache_argument: cache}
    if len(prompt) > 1:
        model(
            input_ids=torch.tensor([prompt[:-1]], device=device),
            logits_to_keep=1,
            **kept,
        )
    blocks = []
    for start in range(0, len(response), n):
        fixed = torch.tensor(response[start : start + n], device=device)
        length = cache.get_seq_length()
        before = torch.tensor([(prompt + response[:start])[-1]], device=device)
        state = torch.tensor(guess[start : start + len(fixed)], device=device)
        states = [state]
        while True:
            window = torch.cat([before, state[:-1]])[None]
            logits = model(input_ids=window, **kept).logits
            # only the last guess, which is never fed, may still be wrong: then the cache is final
            final = torch.equal(state[:-1], fixed[:-1])
            state = logits[0].argmax(dim=-1)
            if not torch.equal(states[-1], state):
                states.append(state)
            if final:
                break
            cache.crop(length - cache.get_seq_length())
        blocks.append(torch.stack(states).tolist())
    return blocks


def guesses(model: Any, prompt: list[int], count: int) -> list[int]:
    table = fill_table(
        "prompt",
        prompts=torch.tensor([prompt]),
        prompt_lengths=torch.tensor([len(prompt)]),
        prompt_width=len(prompt),
        width=len(prompt) + count,
        seed=SEED,
        vocab_size=model.config.vocab_size,
        pad_token_id=0,
    )
    assert table is not None
    return table[0, len(prompt) :].tolist()


def decoded(model: Any, prompts: list[list[int]], tokens: int, n: int) -> list[cllm.Trajectory]:
    """Block-mode Jacobi decoding of all prompts in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = cllm.generate(
        model, input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
        do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, mode="block",
        block_size=n, seed=SEED, record_trajectories=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.trajectories


def collected(
    model: Any, prompts: list[list[int]], responses: list[list[int]], n: int, max_rows: int
) -> States:
    found = collect_states(model, prompts, responses, block_size=n, seed=SEED, max_rows=max_rows)
    return [[block.states for block in entry.example.blocks] for entry in found]


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def differing(left: States, right: States) -> int:
    """Blocks whose trajectories differ (in 16 bits a near-tie may fall differently)."""
    pairs = [
        (one, other)
        for row, beside in zip(left, right, strict=True)
        for one, other in zip(row, beside, strict=True)
    ]
    return sum(one != other for one, other in pairs)


def measure(
    model: Any, prompts: list[list[int]], *, tokens: int, n: int, rounds: int, max_rows: int
) -> dict[str, Any]:
    """One batch of prompts: seconds of the three ways, interleaved."""
    responses = [trajectory.tokens for trajectory in decoded(model, prompts, tokens, n)]
    first = [guesses(model, prompt, tokens) for prompt in prompts]

    def one_by_one() -> States:
        rows = zip(prompts, responses, first, strict=True)
        return [sequential(model, *row[:2], n, row[2]) for row in rows]

    seconds: dict[str, list[float]] = {"block_parallel": [], "sequential": [], "decoding": []}
    for number in range(rounds):
        if number == 0:  # warm-up of the one that has not run yet
            collected(model, prompts[:1], [responses[0][: 2 * n]], n, max_rows)
        spent, parallel = timed(collected, model, prompts, responses, n, max_rows)
        seconds["block_parallel"].append(spent)
        spent, plain = timed(one_by_one)
        seconds["sequential"].append(spent)
        spent, trajectories = timed(decoded, model, prompts, tokens, n)
        seconds["decoding"].append(spent)
    apart = differing(parallel, plain)
    if apart and model.dtype == torch.float32:
        raise SystemExit(f"{apart} blocks' trajectories differ from the sequential definition's")
    gains = {
        name: [
            theirs / ours
            for theirs, ours in zip(seconds[name], seconds["block_parallel"], strict=True)
        ]
        for name in ("sequential", "decoding")
    }
    states = [states for row in parallel for states in row]
    return {
        "responses": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "blocks": len(states),
        "states_per_block": sum(map(len, states)) / len(states),
        "blocks_that_differ": apart,
        "decoding_iterations": sum(len(trajectory.iterations) for trajectory in trajectories),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "response_tokens_per_second": {
            name: len(prompts) * tokens / spread(values)["median"]
            for name, values in seconds.items()
        },
        "gain_over": {name: spread(ratios) for name, ratios in gains.items()},
    }


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="path or hub id; default: the demo's model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a response")
    parser.add_argument("--prompt-tokens", type=int, help="keep so many of each prompt")
    parser.add_argument("--batches", default="1,8", help="responses at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", default=None, help="folder under benchmarks/results")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model, options.dtype, options.device)
    sizes = [int(size) for size in options.batches.split(",")]
    prompts = [
        encode(tokenizer, prompt).tolist()[: options.prompt_tokens]
        for prompt in shipped_prompts()[: max(sizes)]
    ]
    record = {
        "benchmark": "training/collection",
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "block_size": options.block_size,
        "response_tokens": options.tokens,
        "fill": "prompt",
        "rounds": options.rounds,
        "batches": [
            measure(
                model, prompts[:size], tokens=options.tokens, n=options.block_size,
                rounds=options.rounds, max_rows=size,
            )
            for size in sizes
        ],
        **provenance(options.device),
    }  # fmt: skip
    show(record)
    if options.record:
        path = write_record(record, options.record, f"collection_{options.dtype}")
        Console().print(f"record: {path}")
    return record


def show(record: dict[str, Any]) -> None:
    table = Table(
        title=f"{record['model']}, {record['dtype']}, n = {record['block_size']}, responses of "
        f"{record['response_tokens']} tokens, {record['device']}"
    )
    names = ("block_parallel", "sequential", "decoding")
    columns = ("responses", "block-parallel, s", "one by one, s", "batched decoding, s")
    columns += ("gain over one by one", "over decoding")
    for column in columns:
        table.add_column(column, justify="right")
    for batch in record["batches"]:
        gains = [batch["gain_over"][name] for name in ("sequential", "decoding")]
        table.add_row(
            str(batch["responses"]),
            *(f"{batch['seconds'][name]['median']:.1f}" for name in names),
            *(f"{gain['median']:.2f} x ({gain['low']:.2f}-{gain['high']:.2f})" for gain in gains),
        )
    Console().print(table)


if __name__ == "__main__":
    run()
