"""What is a gated adapter worth on prompts it never saw, and is the text the base model's?

Three questions, for every task:

- tokens per forward, of plain Jacobi decoding of the base and with the adapter, each without and
  with guesses looked up in the text, in fp32;
- the text beside HuggingFace's greedy search of the base, token for token, for every prompt in
  fp32; a text that differs is looked at by `cllm.verify`: a near-tie that another width of forward
  decides, or an error. What does not depend on the adapter is kept for the next one;
- the clock: HuggingFace, plain Jacobi and gated decoding of the first prompts in turn, both with
  looking up, at the sizes that `cllm.tune` finds for the data type.

    python benchmarks/adapter/held_out.py --tasks recipes/adapter_held_out.yaml \
        --adapter runs/gated_cpu --work runs/adapter-held-out --record cpu

What is done is kept in the folder --work, prompt by prompt, so that an interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.bench.tasks import Kept, Task, weights_digest
from cllm.evaluation import decode_texts
from cllm.tuning import Window

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load, provenance, spread, write_record
from benchmarks.tasks import read_tasks, token_caps

HUGGINGFACE, PLAIN, GATED = "HuggingFace greedy", "Jacobi", "Jacobi, gated adapter"
LOOKED_UP = ", looked up"
# a prompt's token ids and the most new tokens -> new token ids and forwards
Contender = Callable[[list[int], int], tuple[list[int], int]]


def adapter_digest(adapter: cllm.GatedAdapter) -> str:
    """Names the adapter's weights."""
    digest = hashlib.sha256()
    for name, pair in sorted(adapter.weights.items()):
        digest.update(f"{name} {pair.scaling}".encode())
        for tensor in (pair.a, pair.b):
            digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def tuned(
    model: Any, adapter: cllm.GatedAdapter, tasks: list[Task], options: argparse.Namespace
) -> dict[str, Any]:
    """The best plain and gated windows for a few prompts of every task, and all that was tried."""
    prompts = [prompt for task in tasks for prompt in task.prompts[: options.tune_prompts]]
    found = cllm.tune(model, prompts, adapter, max_new_tokens=options.tune_tokens)
    return {
        PLAIN: asdict(found.fastest(gated=False)),
        GATED: asdict(found.fastest(gated=True)),
        "tuning": found.to_json(),
    }


def greedy_inputs(prompt: list[int], most: int) -> dict[str, Any]:
    """Arguments of ``generate``."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": most, "do_sample": False, "num_beams": 1}
    return {"input_ids": ids, "attention_mask": mask, **settings}


def huggingface(model: Any, prompt: list[int], most: int) -> tuple[list[int], int]:
    """Greedy search."""
    tokens = model.generate(**greedy_inputs(prompt, most))[0, len(prompt) :].tolist()
    return tokens, len(tokens)


def contenders(
    model: Any, adapter: cllm.GatedAdapter, windows: dict[str, Window]
) -> dict[str, Contender]:
    """What runs against the clock, by name."""

    def jacobi(window: Window) -> Contender:
        def run(prompt: list[int], most: int) -> tuple[list[int], int]:
            out = cllm.generate(
                model,
                config=window.config,
                adapter=adapter if window.gated else None,
                return_dict_in_generate=True,
                **greedy_inputs(prompt, most),
            )
            assert isinstance(out, cllm.JacobiOutput)
            assert out.sequences is not None and out.forwards is not None
            return out.sequences[0, len(prompt) :].tolist(), out.forwards

        return run

    greedy = partial(huggingface, model)
    return {HUGGINGFACE: greedy, **{name: jacobi(w) for name, w in windows.items()}}


class Clock:
    """Runs all contenders over one prompt, taking turns at going first.

    Args:
        runs: by name; each gets a few tokens untimed before the first prompt.
    """

    def __init__(self, runs: dict[str, Contender]) -> None:
        self._runs = runs
        self._warm = False

    def __call__(self, prompt: list[int], most: int, number: int) -> dict[str, Any]:
        """Name to ``tokens``, ``forwards`` and ``seconds``."""
        if not self._warm:
            for run in self._runs.values():
                run(prompt, min(4, most))
            self._warm = True
        names = list(self._runs)
        first = number % len(names)
        found = {}
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            tokens, forwards = self._runs[name](prompt, most)
            seconds = time.perf_counter() - started
            found[name] = {"tokens": tokens, "forwards": forwards, "seconds": seconds}
        return found


def compared(
    model: Any,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    references: Sequence[list[int]],
) -> dict[str, int]:
    """Texts that differ from the references, and those of them that a near-tie explains: no token
    of either is further than the tolerance from the argmax of one full forward."""
    mismatches = near_ties = 0
    for prompt, text, reference in zip(prompts, texts, references, strict=True):
        if text != reference:
            mismatches += 1
            sides = [torch.tensor([[*prompt, *side]]) for side in (text, reference)]
            near_ties += all(cllm.verify(model, side, len(prompt)).ok for side in sides)
    return {"texts": len(texts), "mismatches": mismatches, "near_ties": near_ties}


def speeds(
    model: Any, prompts: list[list[int]], rows: list[dict[str, Any]], windows: dict[str, Window]
) -> dict[str, Any]:
    """Statistics of what `Clock` found, and every contender's text beside HuggingFace's."""
    references = [row[HUGGINGFACE]["tokens"] for row in rows]
    found: dict[str, Any] = {}
    theirs = [len(row[HUGGINGFACE]["tokens"]) / row[HUGGINGFACE]["seconds"] for row in rows]
    for name in (HUGGINGFACE, *windows):
        texts = [row[name]["tokens"] for row in rows]
        rates = [len(row[name]["tokens"]) / row[name]["seconds"] for row in rows]
        seconds = sum(row[name]["seconds"] for row in rows)
        found[name] = {
            "window": asdict(windows[name]) if name in windows else None,
            "tokens_per_forward": sum(map(len, texts)) / sum(row[name]["forwards"] for row in rows),
            "tokens_per_second": spread(rates),
            "total_tokens_per_second": sum(map(len, texts)) / seconds,
            "ratio_to_huggingface": spread([a / b for a, b in zip(rates, theirs, strict=True)]),
            **compared(model, prompts, texts, references),
        }
    return found


class Run:
    """One base, one adapter, and the folder that keeps what is finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.base, self.tokenizer = load(options.base, "float32", "cpu")
        self.adapter = cllm.GatedAdapter.load(options.adapter)
        self.adapter.check(self.base)
        self.kept = Kept(options.work)
        self.digest = adapter_digest(self.adapter)
        self.key = [weights_digest(self.base), self.digest]
        sources = dict(entry.split("=", 1) for entry in options.data)
        tasks = read_tasks(
            options.tasks, sources, self.base, self.tokenizer, token_caps(options.max_new_tokens)
        )
        self.tasks = [
            replace(task, prompts=task.prompts[: options.limit])
            for task in tasks
            if not options.task or task.name in options.task
        ]

    def counted(self, task: Task, window: Window, looked_up: bool) -> tuple[float, list[list[int]]]:
        """Tokens per forward of the base, and the texts. Decoded in batches: a row's forwards do
        not depend on the other rows."""
        config = window.config if looked_up else replace(window.config, lookup=0)

        def decode() -> list[dict[str, Any]]:
            found = decode_texts(
                self.base, self.tokenizer, task.prompts, config=config,
                max_new_tokens=task.max_new_tokens, batch_size=self.options.batch_size,
                adapter=self.adapter if window.gated else None,
            )  # fmt: skip
            return [vars(text) for text in found]

        weights = self.key if window.gated else self.key[:1]
        key = [*weights, task.prompts, task.max_new_tokens, asdict(config)]
        found = self.kept.get(f"texts-{task.name}", key, decode)
        texts = [text["tokens"] for text in found]
        return sum(map(len, texts)) / sum(text["forwards"] for text in found), texts

    def references(self, task: Task) -> list[list[int]]:
        """HuggingFace's greedy search of the base in fp32, prompt by prompt."""
        greedy = partial(huggingface, self.base)
        found = []
        for number, prompt in enumerate(task.prompts):
            key = [self.key[0], prompt, task.max_new_tokens]
            decode = partial(greedy, prompt, task.max_new_tokens)
            found.append(self.kept.get(f"reference-{task.name}-{number}", key, decode)[0])
        return found

    def sizes(self, model: Any, dtype: str) -> dict[str, Any]:
        """What `tuned` finds."""
        options = self.options
        key = [*self.key, dtype, torch.get_num_threads(), options.tune_prompts, options.tune_tokens]
        key += [[task.prompts, task.max_new_tokens] for task in self.tasks]
        make = partial(tuned, model, self.adapter, self.tasks, options)
        found: dict[str, Any] = self.kept.get(f"tune-{dtype}", key, make)
        return found

    def clocked(
        self, task: Task, dtype: str, clock: Clock, windows: dict[str, Window]
    ) -> list[dict[str, Any]]:
        """What `Clock` found for the first prompts."""
        most = task.max_new_tokens
        rows = []
        for number, prompt in enumerate(task.prompts[: self.options.clock_prompts]):
            key = [*self.key, dtype, torch.get_num_threads(), prompt, most]
            key.append([asdict(window) for window in windows.values()])
            name = f"clock-{task.name}-{dtype}-{number}"
            rows.append(self.kept.get(name, key, partial(clock, prompt, most, number)))
        return rows

    def results(self, counting: Window) -> dict[str, Any]:
        """The record's ``sizes`` and ``tasks``."""
        sizes: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for task in self.tasks:
            counted: dict[str, dict[str, Any]] = {}
            references = self.references(task)
            windows = {PLAIN: Window(counting.block_size), GATED: counting}
            for kind, end in itertools.product(windows, ("", LOOKED_UP)):
                name = kind + end
                rate, texts = self.counted(task, windows[kind], bool(end))
                counted[name] = {"tokens_per_forward": rate}
                counted[name] |= compared(self.base, task.prompts, texts, references)
                print(f"{task.name}, {name}: {rate:.3f} tokens a forward")
            found[task.name] = {
                "prompts": len(task.prompts), "max_new_tokens": task.max_new_tokens,
                "counted": counted, "speed": {},
            }  # fmt: skip
        for dtype in self.options.dtypes.split(","):
            model = self.base
            if dtype != "float32":
                model = load(self.options.base, dtype, "cpu")[0]
            sizes[dtype] = self.sizes(model, dtype)
            windows = {name: Window(**sizes[dtype][name]) for name in (PLAIN, GATED)}
            print(f"{dtype}: {PLAIN} {windows[PLAIN]}; {GATED} {windows[GATED]}")
            clock = Clock(contenders(model, self.adapter, windows))
            for task in self.tasks:
                result = found[task.name]
                rows = self.clocked(task, dtype, clock, windows)
                speed = speeds(model, task.prompts[: len(rows)], rows, windows)
                result["speed"][dtype] = speed
                ratio = speed[GATED]["ratio_to_huggingface"]["median"]
                print(f"{task.name}, {dtype}: {ratio:.2f} x HuggingFace greedy with the adapter")
        return {"sizes": sizes, "tasks": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument("--adapter", required=True, help="folder or hub id")
    parser.add_argument(
        "--tasks", type=Path, required=True, help="see recipes/adapter_held_out.yaml"
    )
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--task", action="append", help="only this one; may be given again")
    parser.add_argument("--limit", type=int, help="at most so many prompts of a task, to try it")
    parser.add_argument(
        "--max-new-tokens", action="append", metavar="[TASK=]N",
        help="at most so many, where a task has more; may be given again",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=16, help="where forwards are counted")
    parser.add_argument("--verify-size", type=int, help="there; by default the block size")
    parser.add_argument("--batch-size", type=int, default=16, help="there")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="against the clock")
    parser.add_argument(
        "--clock-prompts", type=int, default=16, help="of a task, against the clock"
    )
    parser.add_argument("--tune-prompts", type=int, default=2, help="of a task, to find the sizes")
    parser.add_argument("--tune-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--name", default="adapter_held_out", help="the record's name")
    options = parser.parse_args()
    counting = Window(options.block_size, options.verify_size or options.block_size)
    run = Run(options)
    record = {
        "provenance": provenance("cpu"),
        "base": options.base or "SmolLM2-135M-Instruct",
        "adapter": {
            "parameters": run.adapter.parameters,
            "ranks": list(run.adapter.ranks),
            "digest": run.digest,
            # of the base's name, where it lies on this machine may be part
            "metadata": {k: v for k, v in run.adapter.metadata.items() if k != "base_model"},
        },
        "window": asdict(counting),
        **run.results(counting),
    }
    if options.record:
        print(write_record(record, options.record, options.name))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
