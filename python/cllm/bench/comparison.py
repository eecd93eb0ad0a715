"""Contenders against each other: batches in turn, and what they say of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..spread import Spread
from ..verification import near_tie_tolerance, verify
from .contenders import CONTENDERS, EAGER, TUNED, Setup
from .contest import Contestant, Failed
from .tasks import Kept, Task, code_digest, weights_digest


class NothingToCompare(RuntimeError):
    """HuggingFace's own decoding failed, which all others are compared with."""


@dataclass(frozen=True)
class Plan:
    """How much is decoded.

    Attributes:
        contenders: names of `CONTENDERS`, HuggingFace's eager decoding among them.
        batches: batch sizes.
        most: batch size -> most batches of a task; where it says nothing, all of its prompts count.
        rounds: times that every prompt is decoded.
        warm_up: prompts of every task that are decoded before anything counts.
        warm_up_tokens: most new tokens of each.
    """

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    batches: tuple[int, ...] = (1,)
    most: Mapping[int, int] = field(default_factory=dict)
    rounds: int = 2
    warm_up: int = 2
    warm_up_tokens: int = 32


def in_batches(task: Task, size: int, most: int | None = None) -> list[list[list[int]]]:
    """The task's prompts, `size` at a time, at most `most` times; the others take no part."""
    whole = len(task.prompts) // size * size
    return [task.prompts[start : start + size] for start in range(0, whole, size)][:most]


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
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        large.sum().item()
        best = min(best, time.perf_counter() - started)
    return large.nbytes / best


class Comparison:
    """A process a contender, each with a model of its own; they decode the same batches in turn, so
    that a machine that slows down slows all of them down.

    Attributes:
        failures: who did not take part, or not to the end, and why.

    Args:
        reference: the model in fp32, whose greedy search the texts are compared with.
        tasks: the first `limit` prompts of each count, those behind them warm up.
        kept: finished batches, so that an interrupted run goes on where it was.
        tell: is given a line whenever something is done; None: prints it.

    Raises:
        ValueError: a task with too few prompts for this plan.
    """

    def __init__(
        self,
        reference: Any,
        tasks: Sequence[Task],
        setup: Setup,
        plan: Plan,
        kept: Kept,
        *,
        limit: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.reference, self.setup, self.plan, self.kept = reference, setup, plan, kept
        self.tasks = [replace(task, prompts=task.prompts[:limit]) for task in tasks]
        self.warm_up = [
            task.prompts[len(counted.prompts) :][: plan.warm_up]
            for task, counted in zip(tasks, self.tasks, strict=True)
        ]
        for task, warm in zip(self.tasks, self.warm_up, strict=True):
            if len(warm) < plan.warm_up:
                raise ValueError(f"{task.name}: too few prompts, {plan.warm_up} are for warming up")
            if len(task.prompts) < max(plan.batches):
                raise ValueError(
                    f"{task.name}: {len(task.prompts)} prompts are fewer than the largest batch, "
                    f"{max(plan.batches)}"
                )
        self.key = [weights_digest(reference), asdict(setup), torch.get_num_threads()]
        self.failures: dict[str, str] = {}
        self._tell = tell or partial(print, flush=True)
        self._out: set[tuple[str, int]] = set()
        self._verified: dict[str, bool] = {}  # prompt and text: many contenders have the same one

    def references(self, task: Task) -> list[list[int]]:
        """HuggingFace's greedy search in fp32, prompt by prompt."""

        def decode() -> list[list[int]]:
            found = []
            for prompt in task.prompts:
                ids = torch.tensor([prompt], device=self.setup.device)
                out = self.reference.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                    max_new_tokens=task.max_new_tokens,
                )  # fmt: skip
                found.append(out[0, len(prompt) :].tolist())
            return found

        key = [self.key[0], task.prompts, task.max_new_tokens]
        found: list[list[int]] = self.kept.get(f"reference-{task.name}", key, decode)
        return found

    def _batches(self, task: Task, size: int) -> list[list[list[int]]]:
        return in_batches(task, size, self.plan.most.get(size))

    def _warm_batches(self, size: int) -> list[list[list[int]]]:
        if size == 1:
            return [[prompt] for prompts in self.warm_up for prompt in prompts]
        return [(prompts * size)[:size] for prompts in self.warm_up if prompts]

    def contestants(self) -> Iterator[Contestant]:
        """Those that take part, started.

        Raises:
            NothingToCompare: HuggingFace's eager decoding is not among them.
        """
        plan = self.plan
        most = min(plan.warm_up_tokens, *(task.max_new_tokens for task in self.tasks))
        warm_up = [one for size in plan.batches for one in self._warm_batches(size)]

        def start(name: str) -> Contestant:
            self._tell(f"{name}: starts")
            return Contestant(name, self.setup, torch.get_num_threads(), warm_up, most)

        # who tunes itself needs the machine to itself; on a CPU that is everybody
        together = self.setup.device.startswith("cuda")
        early = [name for name in plan.contenders if together and name not in TUNED]
        started: dict[str, Contestant] = {}
        try:
            if early:
                with ThreadPoolExecutor(len(early) + 1) as pool:
                    decoded = pool.submit(lambda: [self.references(task) for task in self.tasks])
                    starting = {name: pool.submit(start, name) for name in early}
                    started = {name: future.result() for name, future in starting.items()}
                    decoded.result()
            else:  # before anything is timed, and while the memory is there
                for task in self.tasks:
                    self.references(task)
            for name in plan.contenders:
                one = started.pop(name, None) or start(name)
                if one.absent is None:
                    self._tell(f"{one.name}: ready")
                    yield one
                    continue
                self._tell(f"{one.name}: does not take part: {one.absent}")
                self.failures[one.name] = one.absent
                one.close()
                if one.name == EAGER:
                    raise NothingToCompare(f"there is nothing to compare with: {one.absent}")
        finally:
            for one in started.values():
                one.close()

    def run(self) -> dict[str, Any]:
        """Batch size -> task -> contender -> figures."""
        alive: list[Contestant] = []
        found: dict[str, Any] = {}
        try:
            alive.extend(self.contestants())
            for size in self.plan.batches:
                rows: dict[str, dict[str, list[Any]]] = {}
                turn = 0
                for number in range(self.plan.rounds):
                    for task in self.tasks:
                        for place, prompts in enumerate(self._batches(task, size)):
                            first = turn % max(1, len(alive))
                            turn += 1
                            for one in alive[first:] + alive[:first]:
                                self._one(one, task, size, number, place, prompts, rows)
                    self._tell(f"batch {size}: round {number + 1} of {self.plan.rounds}")
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
        where = self._where(one.name, task, size, number, place, prompts)
        try:
            done = self.kept.get(*where, lambda: one.decode(prompts, task.max_new_tokens))
        except Failed as error:
            if one.name == EAGER:
                raise NothingToCompare(f"{EAGER}, batch {size}: {error}") from error
            self._out.add((one.name, size))
            self.failures[f"{one.name}, batch {size}"] = str(error)
            self._tell(f"{one.name}, batch {size}: {error}")
            return
        rows.setdefault(task.name, {}).setdefault(one.name, []).append(done)

    def _where(
        self, name: str, task: Task, size: int, number: int, place: int, prompts: list[list[int]]
    ) -> tuple[str, list[Any]]:
        """Under which a contender's batch is kept."""
        key = [*self.key, code_digest(), name, prompts, task.max_new_tokens, number]
        return f"{task.name}-{size}-{number}-{place}", key

    def finished(self) -> dict[str, Any]:
        """As `run`, of what is kept alone: batch sizes and tasks that HuggingFace has been through,
        and of the other contenders those that have, too. Nobody is started."""
        found: dict[str, Any] = {}
        for size in self.plan.batches:
            rows: dict[str, dict[str, list[Any]]] = {}
            for task in self.tasks:
                places = list(enumerate(self._batches(task, size)))
                for name in self.plan.contenders:
                    done = [
                        self.kept.find(*self._where(name, task, size, number, place, prompts))
                        for number in range(self.plan.rounds)
                        for place, prompts in places
                    ]
                    if None not in done:
                        rows.setdefault(task.name, {})[name] = done
            whole = {name: named for name, named in rows.items() if EAGER in named}
            if whole:
                found[str(size)] = self._figures(size, whole)
        return found

    def _figures(self, size: int, rows: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        rounds = self.plan.rounds
        for task in self.tasks:
            named = rows.get(task.name)
            if named is None:  # cut off before it
                continue
            whole = len(self._batches(task, size)) * size
            count = len(self._batches(task, size)) * rounds
            references = self.references(task)[:whole] * rounds
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
                ratios = [a / b for a, b in zip(rates, base, strict=True)]
                found[task.name][name] = {
                    "tokens_per_second": asdict(Spread.of(rates)),
                    "ratio": asdict(Spread.of(ratios)),
                    "tokens_per_forward": sum(map(len, texts)) / (size * sum(forwards)),
                    "seconds_per_forward": sum(one["seconds"] for one in done) / sum(forwards),
                    "first_token": asdict(Spread.of(first)) if first else None,
                    "peak_bytes": max(one["peak_bytes"] for one in done),
                    **self._same(task, texts, references),
                }
        return found

    def _same(self, task: Task, texts: list[Any], references: list[Any]) -> dict[str, int]:
        """Texts that are the reference's, and of the others those that a near-tie explains."""
        same = ties = 0
        rounds = self.plan.rounds
        prompts = task.prompts[: len(references) // rounds] * rounds
        for prompt, text, reference in zip(prompts, texts, references, strict=True):
            if text == reference:
                same += 1
                continue
            key = json.dumps([prompt, text])
            if key not in self._verified:
                tokens = torch.tensor([[*prompt, *text]], device=self.reference.device)
                bound = near_tie_tolerance(getattr(torch, self.setup.dtype))
                verified = verify(self.reference, tokens, len(prompt), tolerance=bound)
                self._verified[key] = verified.ok
            ties += self._verified[key]
        return {"texts": len(texts), "same": same, "near_ties": ties}

    def floor(self) -> dict[str, float]:
        """The time in which this machine reads the weights once, and what it is made of."""
        rate = bandwidth(self.setup.device)
        size = weight_bytes(self.reference) * getattr(torch, self.setup.dtype).itemsize // 4
        return {
            "weight_bytes": size, "bytes_per_second": rate, "seconds_per_forward": size / rate,
        }  # fmt: skip
