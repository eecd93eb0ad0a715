"""How fast is every way to decode a model, on the same prompts, in one run?

A process a contender (`contenders.py`), each with a model of its own; they decode the same batches
in turn, so that a machine that slows down slows all of them down. Of every contender: tokens per
second, as ratios to HuggingFace's greedy search of the same batch in the same round; tokens per
forward, every forward counted, the prefill too; the time to the first token; peak memory; whether
its texts are those of HuggingFace's greedy search in fp32; and how near it comes to the floor, the
time in which this machine reads the weights once.

    python benchmarks/decoding/compare.py --tasks recipes/adapter_held_out.yaml \
        --tasks recipes/mt_bench.yaml --dtype bfloat16 --adapter ADAPTER \
        --work runs/compare --record cpu
    python benchmarks/decoding/compare_report.py

Finished batches are kept in --work, so that an interrupted run goes on where it was. A contender
that fails is named with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.verification import near_tie_tolerance

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.decoding.contenders import CONTENDERS, EAGER, Setup
from benchmarks.decoding.contest import Contestant, Failed
from benchmarks.harness import load, provenance, spread, write_record
from benchmarks.tasks import Kept, Task, read_tasks, token_caps, weights_digest


def batches(task: Task, size: int) -> list[list[list[int]]]:
    """The task's prompts, `size` at a time; what is left over takes no part."""
    whole = len(task.prompts) // size * size
    return [task.prompts[start : start + size] for start in range(0, whole, size)]


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a forward of one token reads: all but the rows of the embedding
    that it does not look up, where they are not the head's, too."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return total if head.weight is embedding.weight else total - embedding.weight.nbytes


def bandwidth(device: str) -> float:
    """Bytes per second that this machine reads at most: the sum of a large tensor."""
    large = torch.ones(64 << 20, device=device)
    best = float("inf")
    for _ in range(5):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        started = time.perf_counter()
        large.sum().item()
        best = min(best, time.perf_counter() - started)
    return large.nbytes / best


class Comparison:
    """Contenders, tasks, and what is finished of both."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.reference, self.tokenizer = load(options.base, "float32", options.device)
        sources = dict(entry.split("=", 1) for entry in options.data)
        caps = token_caps(options.max_new_tokens)
        tasks = [
            task
            for path in options.tasks
            for task in read_tasks(path, sources, self.reference, self.tokenizer, caps)
        ]
        # prompts behind those that count warm the contenders up
        warm = options.warm_up
        self.tasks = [replace(t, prompts=t.prompts[: options.limit]) for t in tasks]
        self.warm_up = [t.prompts[options.limit : options.limit + warm] for t in tasks]
        if any(len(prompts) < warm for prompts in self.warm_up):
            raise SystemExit("compare: a task has too few prompts for --limit and --warm-up")
        if any(len(task.prompts) < max(options.batch) for task in self.tasks):
            raise SystemExit("compare: a task has fewer prompts than the largest --batch")
        self.kept = Kept(options.work)
        folder = self.reference.config.name_or_path
        longest = max(len(p) + t.max_new_tokens for t in tasks for p in t.prompts)
        self.setup = Setup(
            folder, options.dtype, options.device, options.adapter, options.draft,
            options.cllm_weights, options.block_size, longest + 16,
        )  # fmt: skip
        self.key = [weights_digest(self.reference), asdict(self.setup), torch.get_num_threads()]
        self.failures: dict[str, str] = {}
        self._out: set[tuple[str, int]] = set()

    def references(self, task: Task) -> list[list[int]]:
        """HuggingFace's greedy search in fp32, prompt by prompt."""

        def decode() -> list[list[int]]:
            found = []
            for prompt in task.prompts:
                ids = torch.tensor([prompt], device=self.options.device)
                out = self.reference.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                    max_new_tokens=task.max_new_tokens,
                )  # fmt: skip
                found.append(out[0, len(prompt) :].tolist())
            return found

        key = [self.key[0], task.prompts, task.max_new_tokens]
        return self.kept.get(f"reference-{task.name}", key, decode)

    def _warm_batches(self, size: int) -> list[list[list[int]]]:
        if size == 1:
            return [[prompt] for prompts in self.warm_up for prompt in prompts]
        return [(prompts * size)[:size] for prompts in self.warm_up if prompts]

    def contestants(self) -> Iterator[Contestant]:
        options = self.options
        most = min(options.warm_up_tokens, *(task.max_new_tokens for task in self.tasks))
        warm_up = [one for size in options.batch for one in self._warm_batches(size)]

        def start(name: str) -> Contestant:
            return Contestant(name, self.setup, torch.get_num_threads(), warm_up, most)

        # on a CPU one by one, so that nobody tunes itself while others are at work
        at_once = len(CONTENDERS) if options.device.startswith("cuda") else 1
        with ThreadPoolExecutor(at_once) as pool:
            started = list(pool.map(start, options.contender or CONTENDERS))
        for one in started:
            name = one.name
            if one.absent is None:
                print(f"{name}: ready", flush=True)
                yield one
            else:
                print(f"{name}: does not take part: {one.absent}", flush=True)
                self.failures[name] = one.absent
                one.close()
                if name == EAGER:
                    raise SystemExit(f"compare: there is nothing to compare with: {one.absent}")

    def run(self) -> dict[str, Any]:
        """The record's ``batches``: batch size -> task -> contender -> figures."""
        alive = list(self.contestants())
        found: dict[str, Any] = {}
        try:
            for size in self.options.batch:
                rows: dict[str, dict[str, list[Any]]] = {}
                turn = 0
                for number in range(self.options.rounds):
                    for task in self.tasks:
                        for place, prompts in enumerate(batches(task, size)):
                            first = turn % max(1, len(alive))
                            turn += 1
                            for one in alive[first:] + alive[:first]:
                                self._one(one, task, size, number, place, prompts, rows)
                    print(f"batch {size}: round {number + 1} of {self.options.rounds}", flush=True)
                found[str(size)] = self._figures(size, rows)
        finally:
            for one in alive:
                one.close()
        return found

    def _one(
        self,
        one: Contestant,
        task: Task,
        size: int,
        number: int,
        place: int,
        prompts: list[list[int]],
        rows: dict[str, dict[str, list[Any]]],
    ) -> None:
        if (one.name, size) in self._out:
            return
        key = [*self.key, one.name, prompts, task.max_new_tokens, number]
        name = f"{task.name}-{size}-{number}-{place}"
        try:
            done = self.kept.get(name, key, lambda: one.decode(prompts, task.max_new_tokens))
        except Failed as error:
            self._out.add((one.name, size))
            self.failures[f"{one.name}, batch {size}"] = str(error)
            print(f"{one.name}, batch {size}: {error}", flush=True)
            return
        rows.setdefault(task.name, {}).setdefault(one.name, []).append(done)

    def _figures(self, size: int, rows: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task in self.tasks:
            named = rows[task.name]
            count = len(batches(task, size)) * self.options.rounds
            whole = len(batches(task, size)) * size
            references = self.references(task)[:whole] * self.options.rounds
            theirs = named[EAGER]
            found[task.name] = {"prompts": whole, "max_new_tokens": task.max_new_tokens}
            for name in CONTENDERS:
                done = named.get(name, [])
                if len(done) < count:  # it failed on the way
                    continue
                texts = [text for one in done for text in one["texts"]]
                rates = [sum(map(len, one["texts"])) / one["seconds"] for one in done]
                base = [sum(map(len, one["texts"])) / one["seconds"] for one in theirs]
                forwards = [one["forwards"] for one in done]
                first = [one["first_token"] for one in done if one["first_token"] is not None]
                found[task.name][name] = {
                    "tokens_per_second": spread(rates),
                    "ratio": spread([a / b for a, b in zip(rates, base, strict=True)]),
                    "tokens_per_forward": sum(map(len, texts)) / (size * sum(forwards)),
                    "seconds_per_forward": sum(one["seconds"] for one in done) / sum(forwards),
                    "first_token": spread(first) if first else None,
                    "peak_bytes": max(one["peak_bytes"] for one in done),
                    **self._same(task, texts, references),
                }
        return found

    def _same(self, task: Task, texts: list[Any], references: list[Any]) -> dict[str, int]:
        """Texts that are the reference's, and of the others those that a near-tie explains."""
        same = ties = 0
        prompts = task.prompts[: len(references) // self.options.rounds] * self.options.rounds
        seen: dict[str, bool] = {}
        for prompt, text, reference in zip(prompts, texts, references, strict=True):
            if text == reference:
                same += 1
                continue
            key = json.dumps([prompt, text])
            if key not in seen:
                tokens = torch.tensor([[*prompt, *text]], device=self.options.device)
                bound = near_tie_tolerance(getattr(torch, self.options.dtype))
                verified = cllm.verify(self.reference, tokens, len(prompt), tolerance=bound)
                seen[key] = verified.ok
            ties += seen[key]
        return {"texts": len(texts), "same": same, "near_ties": ties}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument(
        "--tasks", type=Path, action="append", required=True,
        help="see recipes/adapter_held_out.yaml; may be given again",
    )  # fmt: skip
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapter", help="gated adapter of the base")
    parser.add_argument("--draft", help="a smaller model with the same tokenizer")
    parser.add_argument("--cllm-weights", help="a consistency LLM of the base")
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="only these")
    parser.add_argument("--batch", type=int, action="append", help="batch size; default 1")
    parser.add_argument("--block-size", type=int, default=4, help="n where it is not automatic")
    parser.add_argument("--limit", type=int, default=8, help="prompts of a task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--warm-up", type=int, default=2, help="prompts of a task that do not count"
    )
    parser.add_argument("--warm-up-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", action="append", metavar="[TASK=]N")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--name", help="the record's name; default compare_DTYPE")
    options = parser.parse_args()
    options.batch = options.batch or [1]
    if options.contender and EAGER not in options.contender:
        options.contender.insert(0, EAGER)
    comparison = Comparison(options)
    rate = bandwidth(options.device)
    found = comparison.run()
    size = weight_bytes(comparison.reference) * getattr(torch, options.dtype).itemsize // 4
    record = {
        "provenance": provenance(options.device),
        "model": options.base or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "block_size": options.block_size,
        "rounds": options.rounds,
        "floor": {
            "weight_bytes": size,
            "bytes_per_second": rate,
            "seconds_per_forward": size / rate,
        },
        "absent": comparison.failures,
        "batches": found,
    }
    if options.record:
        name = options.name or f"compare_{options.dtype}"
        print(write_record(record, options.record, name))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
