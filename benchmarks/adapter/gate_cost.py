"""What does the gate cost: a window that stands twice, with an adapter on half of its rows?

Time: a gated forward of n verify and n guess rows beside a plain forward of 2n rows, and beside the
same without the adapter, in turn. Memory: the adapter's weights, as they are kept and as they are
multiplied with, and the cache slots of one more window.

    python benchmarks/adapter/gate_cost.py --dtype bfloat16 --record cpu
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.decoding.forward import BlockForward
from cllm.decoding.forward_clock import ForwardClock
from cllm.decoding.layouts import choose_layout
from cllm.decoding.support import check_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load, provenance, spread, write_record


def tensor_bytes() -> int:
    """Of all tensors that Python can reach, shared memory counted once."""
    gc.collect()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def cost(clock: ForwardClock, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the three forwards of 2n rows, and ratios to the plain one of the round."""
    names = ("plain", "twice", "gated")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        found = {
            "plain": clock.plain(2 * n, options.forwards),
            "twice": clock.gated(n, n, options.forwards, adapter=False),
            "gated": clock.gated(n, n, options.forwards),
        }
        if number:  # the first round warms up
            for name in names:
                seconds[name].append(found[name])
    return {
        "rows": 2 * n,
        "milliseconds": {name: spread([1e3 * s for s in seconds[name]]) for name in names},
        "ratio": {
            name: spread([a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)])
            for name in ("twice", "gated")
        },
    }


@torch.no_grad()
def memory(
    clock: ForwardClock,
    model: Any,
    adapter: cllm.GatedAdapter,
    prompt: list[int],
    n: int,
    tokens: int,
) -> dict[str, Any]:
    """Bytes of the adapter, which has not run yet, and of the caches of a plain and a gated call of
    n = v."""
    clock.gated(n, n, 1, adapter=False)  # what such forwards keep without one, too
    before = tensor_bytes()
    clock.gated(n, n, 1)
    in_use = tensor_bytes() - before
    traits, ids = check_model(model), torch.tensor([prompt])
    caches = {}
    for name, rows in (("plain", n), ("gated", 2 * n)):
        layout = choose_layout(model, traits, ids[0], rows, gated=name == "gated")
        slots = len(prompt) + tokens + rows
        forward = BlockForward(
            model, traits, batch=1, slots=slots, device=ids.device, position_limit=traits.context,
            layout=layout,
        )  # fmt: skip
        with layout.applied(model):
            forward.prefill(ids[:, :-1], torch.tensor([len(prompt) - 1]))
        taken = forward.cache.nbytes
        capacity = forward.plan.capacity
        caches[name] = {
            "slots": slots,
            "allocated_slots": capacity,
            "allocated_bytes": taken,
            "bytes_per_slot": taken // capacity,
        }
    weights = [tensor for pair in adapter.weights.values() for tensor in (pair.a, pair.b)]
    return {
        "base_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "adapter_parameters": adapter.parameters,
        "adapter_bytes": sum(tensor.nbytes for tensor in weights),
        "adapter_bytes_while_decoding": in_use,
        "n": n,
        "cache": caches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument("--adapter", help="folder or hub id; by default random weights")
    parser.add_argument("--rank", type=int, default=24, help="of random weights")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", default="4,8,16", help="n: forwards of 2n rows")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=256, help="that the cache has room for")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--forwards", type=int, default=4, help="of each kind in a round")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]

    model, _ = load(options.base, options.dtype, "cpu")
    if options.adapter:
        adapter = cllm.GatedAdapter.load(options.adapter)
    else:
        adapter = cllm.GatedAdapter.random(model, options.rank)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(3, vocabulary, (options.context,), generator=generator).tolist()
    clock = ForwardClock(model, prompt, options.tokens + 2 * max(sizes), adapter)
    found = memory(clock, model, adapter, prompt, max(sizes), options.tokens)
    record = {
        "provenance": provenance("cpu"),
        "base": options.base or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "ranks": list(adapter.ranks),
        "modules": len(adapter.weights),
        "context": options.context,
        "rounds": options.rounds,
        "sizes": [cost(clock, n, options) for n in sizes],
        "memory": found,
    }
    if options.record:
        print(write_record(record, options.record, f"gate_cost_{options.dtype}"))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
