"""Several windows for the same places, from all that there is to guess from: one launch beside
dozens.

The state is guess_window's: half of the texts repeat themselves, of the others all of the text is
searched, once for every way that it may go on in. On a GPU the same calls are also replayed as a
CUDA graph, which is how a decoding loop runs them.

    python benchmarks/kernels/guess_candidates.py --device cpu --record
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
from benchmarks.kernels.guess_window import KEPT, LEAST, ORDER, state
from benchmarks.kernels.harness import main
from cllm_kernels.guess_candidates import OP, reference

SIZES = [(1, 2, 4, 512, 49152), (8, 2, 8, 2048, 49152), (64, 4, 16, 1024, 16384)]  # B, C, n, L, V
QUICK = [(2, 2, 4, 40, 97)]
CALLS = 32
LONGEST = 8


def written_out(count: int, *arguments: Tensor) -> Tensor:
    window, *sources, odds, proposed, since = arguments
    end = sources[1].shape[1]
    return reference.guess_candidates(
        window, count, *sources, LONGEST, LEAST, end, False, odds, proposed, since
    )


def op(count: int, *arguments: Tensor) -> Tensor:
    kept = dict(zip(KEPT, arguments[5:], strict=True))
    return cllm_kernels.guess_candidates(
        arguments[0], count, *arguments[1:5], longest=LONGEST, least=LEAST, **kept
    )


def eager(count: int) -> Callable[[Callable[..., Tensor]], Callable[[Inputs], Run]]:
    def of(guess: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
        def build(inputs: Inputs) -> Run:
            arguments = [inputs[name] for name in ORDER]
            started = [inputs[name] for name in KEPT]
            # of their own for each call, or only the first would have something to count
            kept = [[tensor.clone() for tensor in started] for _ in range(CALLS)]

            def call() -> tuple[Tensor, ...]:
                made = [guess(count, *arguments, *one) for one in kept]
                return *made, *(tensor for one in kept for tensor in one)

            def prepare() -> None:
                for one in kept:
                    for tensor, start in zip(one, started, strict=True):
                        tensor.copy_(start)

            return Run(call, prepare, calls=CALLS)

        return build

    return of


def case(rows: int, count: int, n: int, width: int, vocabulary: int, device: torch.device) -> Case:
    # the text, the window read and the candidates written, an entry of the pool a guess,
    # proposals and what has become of them, three kinds' counts and the place
    moved = 8 * rows * (width + 2 + n + count * n + n - 1)
    moved += 8 * rows * (2 * 3 * n + n - 1 + 2 * 3 * 2 + 2)
    return Case(
        name=f"B={rows} C={count} n={n} L={width}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "C": count, "n": n, "L": width, "V": vocabulary, "calls": CALLS},
        make_inputs=state(rows, n, width, vocabulary, True, LONGEST),
        variants=launch_variants(
            OP,
            device,
            eager(count),
            written_out,
            op,
            moved,
        ),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [case(*sizes, device) for sizes in (QUICK if quick else SIZES)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("guess_candidates", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
