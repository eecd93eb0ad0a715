"""Better guesses for the windows of a decoding batch: one launch beside dozens.

Half of the texts repeat themselves, so that the text gives their guesses; of the others all of the
text is searched, and the guesses are a chain through the pool. Where the sources are weighed by how
often each was right, every row has both, and every call counts proposals, some of them right. A
call takes microseconds, so a sample is `CALLS` of them: a window that has its guesses gets the same
again. On a GPU the same calls are also replayed as a CUDA graph, which is how a decoding loop runs
them.

    python benchmarks/kernels/guess_window.py --device cpu --record
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels.cases import Case, Inputs, Run, launch_variants
from benchmarks.kernels.harness import main
from cllm_kernels.guess_window import OP, reference

SIZES = [(1, 4, 512, 49152), (8, 8, 2048, 49152), (64, 16, 1024, 16384)]  # (B, n, L, V)
QUICK = [(2, 4, 40, 97)]
CALLS = 32
LONGEST, LEAST = 8, 2
ORDER = ("window", "latest", "sequences", "generated", "starts")
KEPT = ("odds", "proposed", "since")


def state(
    rows: int, n: int, width: int, vocabulary: int, weighed: bool, longest: int = LONGEST
) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        text = torch.randint(0, vocabulary, (rows, width))
        period = width // 3
        text[::2, period:] = text[::2, :-period].clone()
        generated = torch.full((rows,), width - n)
        stamps = torch.arange(vocabulary) * vocabulary
        made = {
            "window": text.gather(1, generated[:, None] - 1 + torch.arange(n)),
            "latest": stamps + torch.randint(0, vocabulary, (rows, vocabulary)),
            "sequences": text,
            "generated": generated,
            "starts": torch.zeros(rows, dtype=torch.int64),
        }
        if weighed:
            made["odds"] = torch.full((rows, 2 + longest, 2), reference.GUESS)
            since = generated - n  # all that was proposed is known: the window's own was right
            kinds = torch.tensor([0, 1, 1 + LEAST])[:, None].expand(rows, -1, 1)
            right = text.gather(1, since[:, None] + torch.arange(n - 1))
            guesses = torch.stack([right, right.flip(1), right.roll(1, dims=1)], dim=1)
            made["proposed"] = torch.cat([kinds, guesses], dim=2)
            made["since"] = since
        return {name: tensor.to(device) for name, tensor in made.items()}

    return make


def written_out(*arguments: Tensor) -> None:
    end = arguments[2].shape[1]
    reference.guess_window(*arguments[:5], LONGEST, LEAST, end, *arguments[5:])


def op(*arguments: Tensor) -> None:
    kept = dict(zip(KEPT, arguments[5:], strict=False))
    cllm_kernels.guess_window(*arguments[:5], longest=LONGEST, least=LEAST, **kept)


def eager(guess: Callable[..., None]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        window = inputs["window"].clone()
        arguments = (window, *(inputs[name] for name in ORDER[1:]))
        started = [inputs[name] for name in KEPT if name in inputs]
        # of their own for each call, or only the first would have something to count
        kept = [[tensor.clone() for tensor in started] for _ in range(CALLS)]

        def call() -> tuple[Tensor, ...]:
            for one in kept:
                guess(*arguments, *one)
            return window, *(tensor for one in kept for tensor in one)

        def prepare() -> None:
            window.copy_(inputs["window"])
            for one in kept:
                for tensor, start in zip(one, started, strict=True):
                    tensor.copy_(start)

        return Run(call, prepare, calls=CALLS)

    return build


def case(
    rows: int, n: int, width: int, vocabulary: int, weighed: bool, device: torch.device
) -> Case:
    # the text, two numbers a row, the window read and written, an entry of the pool a guess
    moved = 8 * rows * (width + 2 + 2 * n + n - 1)
    if weighed:  # proposals and what has become of them, three kinds' counts and the place
        moved += 8 * rows * (2 * 3 * n + n - 1 + 2 * 3 * 2 + 2)
    return Case(
        name=f"B={rows} n={n} L={width}{' weighed' if weighed else ''}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "n": n, "L": width, "V": vocabulary, "weighed": weighed, "calls": CALLS},
        make_inputs=state(rows, n, width, vocabulary, weighed),
        variants=launch_variants(OP, device, eager, written_out, op, moved),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    sizes = QUICK if quick else SIZES
    return [case(*one, weighed, device) for one in sizes for weighed in (False, True)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("guess_window", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
