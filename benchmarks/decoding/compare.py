"""How fast is every way to decode a model, on the same prompts, in one run?

A process a contender (`cllm.bench`), each with a model of its own; they decode the same batches
in turn, so that a machine that slows down slows all of them down. Of every contender: tokens per
second, as ratios to HuggingFace's greedy search of the same batch in the same round; tokens per
forward, every forward counted, the prefill too; the time to the first token; peak memory; whether
its texts are those of HuggingFace's greedy search in fp32; and how near it comes to the floor, the
time in which this machine reads the weights once.

    python benchmarks/decoding/compare.py --tasks recipes/adapter_held_out.yaml \
        --tasks recipes/mt_bench.yaml --dtype bfloat16 --adapter ADAPTER \
        --work runs/compare --record cpu
    python benchmarks/decoding/compare_report.py

Finished batches are kept in --work, so that an interrupted run goes on where it was; until it does,
its record is that of the tasks it had finished. A contender that fails is named with its reason,
and the others go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load, provenance, write_record
from benchmarks.tasks import read_tasks, token_caps
from cllm.adapter.peft_format import WEIGHTS, find_folder
from cllm.bench.comparison import Comparison, NothingToCompare, Plan
from cllm.bench.contenders import CONTENDERS, EAGER, Setup
from cllm.bench.tasks import Kept


def batch(text: str) -> tuple[int, int | None]:
    """``"16"`` or ``"16:2"``: a batch size, and the most batches of a task or None."""
    size, colon, most = text.partition(":")
    numbers = int(size), int(most) if colon else None
    if min(number for number in numbers if number is not None) < 1:
        raise ValueError(text)
    return numbers


def adapter_digest(folder: str | None) -> str | None:
    """Names the adapter's weights: the SHA-256 of their file."""
    if folder is None:
        return None
    return hashlib.sha256((find_folder(folder) / WEIGHTS).read_bytes()).hexdigest()


def comparison(options: argparse.Namespace) -> Comparison:
    reference, tokenizer = load(options.base, "float32", options.device)
    sources = dict(entry.split("=", 1) for entry in options.data)
    caps = token_caps(options.max_new_tokens)
    tasks = [
        task
        for path in options.tasks
        for task in read_tasks(path, sources, reference, tokenizer, caps)
    ]
    longest = max(len(p) + t.max_new_tokens for t in tasks for p in t.prompts)
    setup = Setup(
        reference.config.name_or_path, options.dtype, options.device, options.adapter,
        options.draft, options.cllm_weights, options.block_size, longest + 16,
    )  # fmt: skip
    plan = Plan(
        contenders=tuple(options.contender or CONTENDERS), batches=tuple(options.batch),
        most={size: most for size, most in options.batch.items() if most is not None},
        rounds=options.rounds, warm_up=options.warm_up, warm_up_tokens=options.warm_up_tokens,
    )  # fmt: skip
    return Comparison(reference, tasks, setup, plan, Kept(options.work), limit=options.limit)


def decoded(one: Comparison) -> tuple[dict[str, Any], bool]:
    """The figures, and whether they are those of what was finished when somebody ended the run
    (Ctrl-C, or the signal that `timeout` sends).

    Raises:
        NothingToCompare: ended before HuggingFace's own decoding had finished a task.
    """

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, end)
    try:
        return one.run(), False
    except KeyboardInterrupt:
        # not a second time: texts are compared now, which takes a while
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        found = one.finished()
        if not found:
            raise NothingToCompare("it was ended before a task was finished") from None
        whole = len(found) == len(one.plan.batches) and all(
            len(tasks) == len(one.tasks) for tasks in found.values()
        )
        return found, not whole
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    parser.add_argument(
        "--batch", type=batch, action="append", metavar="SIZE[:MOST]",
        help="batch size, and the most batches of a task; default 1, over all prompts",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, help="n where it is not automatic")
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
    options.batch = dict(options.batch or [(1, None)])
    if options.contender and EAGER not in options.contender:
        options.contender.insert(0, EAGER)
    try:
        digest = adapter_digest(options.adapter)
        one = comparison(options)
        floor = one.floor()
        found, cut_off = decoded(one)
    except (NothingToCompare, ValueError) as error:
        raise SystemExit(f"compare: {error}") from error
    record: dict[str, Any] = {
        "provenance": provenance(options.device),
        "model": options.base or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "block_size": options.block_size,
        "adapter": digest,
        "rounds": options.rounds,
        "floor": floor,
        "absent": one.failures,
        **({"cut_off": True} if cut_off else {}),
        "batches": found,
    }
    if options.record:
        name = options.name or f"compare_{options.dtype}"
        print(write_record(record, options.record, name))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
