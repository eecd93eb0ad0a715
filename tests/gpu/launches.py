"""Launches every GPU kernel of every op a few times on small shapes: what the sanitizer watches.

    python tests/gpu/launches.py

Prints one line of JSON per launch: the op, the backend, the case, and the error if it raised one.
Shapes are ragged, so that masks and tails run; each result is read, so that the launch has ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from cllm_kernels._backend import Op, registered

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Launch = tuple[str, Callable[[], Any]]  # what it is, and what launches it


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def row_argmax() -> Iterator[Launch]:
    for dtype in DTYPES:
        logits = random(3, 5003, dtype=dtype)
        yield str(dtype), lambda logits=logits: cllm_kernels.row_argmax(logits)


def gumbel_noise() -> Iterator[Launch]:
    for rows in (1, 5):
        numbers = torch.arange(rows, device=DEVICE)
        yield f"rows={rows}", lambda r=numbers: cllm_kernels.gumbel_noise(1, r, r, 5003)


def rms_norm() -> Iterator[Launch]:
    for dtype in DTYPES:
        for width in (1, 71, 4096):
            x, weight = random(3, 5, width, dtype=dtype), random(width, dtype=dtype)
            yield (
                f"{dtype} H={width}",
                lambda x=x, w=weight: cllm_kernels.rms_norm(x, w, eps=1e-5),
            )


def block_linear() -> Iterator[Launch]:
    """Of 16 bits: fp32 is torch's own product."""
    for dtype in DTYPES[1:]:
        for rows in (1, 19, 64):
            x, weight = random(rows, 208, dtype=dtype), random(99, 208, dtype=dtype)
            bias = random(99, dtype=dtype)
            yield (
                f"{dtype} rows={rows}",
                lambda x=x, w=weight, b=bias: cllm_kernels.block_linear(x, w, b),
            )


def decoder_layer() -> Iterator[Launch]:
    for dtype in DTYPES:
        for norms in (False, True):
            for guesses, width in ((None, None), (3, None), (3, 2)):
                # odd sizes: cuBLAS stores aligned tiles by TMA, whose writes initcheck does not
                # see; and such whose products are ours
                for sizes in ((71, 101, 20), (80, 112, 16))[: 1 if dtype == torch.float32 else 2]:
                    yield (
                        f"{dtype} {sizes} norms={norms} guesses_from={guesses} width={width}",
                        lambda d=dtype, sizes=sizes, norms=norms, chains=(guesses, width): layer(
                            d, sizes, norms, *chains
                        ),
                    )


def layer(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    norms: bool,
    guesses: int | None,
    guess_width: int | None,
) -> torch.Tensor:
    hidden, inner, width = sizes
    heads, kv_heads, rank, n = 6, 2, 3, 7
    shapes = [(heads * width, hidden), *[(kv_heads * width, hidden)] * 2, (hidden, heads * width)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    weights = cllm_kernels.DecoderWeights(
        *(random(*shape, dtype=dtype) for shape in shapes),
        attention_norm=random(hidden, dtype=dtype),
        mlp_norm=random(hidden, dtype=dtype),
        head_size=width,
        query_norm=random(width, dtype=dtype) if norms else None,
        key_norm=random(width, dtype=dtype) if norms else None,
        low_rank=[
            (random(rank, columns, dtype=dtype), random(rows, rank, dtype=dtype))
            for rows, columns in shapes
            if guesses is not None
        ]
        or (),
    )
    return cllm_kernels.decoder_layer(
        random(3, n, hidden, dtype=dtype),
        weights,
        *(random(3, n, width, dtype=dtype) for _ in range(2)),
        *(random(3, kv_heads, 50, width, dtype=dtype) for _ in range(2)),
        torch.tensor([0, 7, 40], device=DEVICE),
        eps=1e-5,
        guesses_from=guesses,
        guess_width=guess_width,
        gated_from=guesses,
    )


def linear_argmax() -> Iterator[Launch]:
    for dtype in DTYPES:
        for rows in (1, 19, 70):
            hidden, weight = random(rows, 72, dtype=dtype), random(299, 72, dtype=dtype)
            bias = random(299)
            yield (
                f"{dtype} rows={rows}",
                lambda h=hidden, w=weight, b=bias: cllm_kernels.linear_argmax(
                    h, w, bias=b, softcap=15.0
                ),
            )
            numbers = torch.arange(rows, device=DEVICE)
            yield (
                f"{dtype} rows={rows} sampled",
                lambda h=hidden, w=weight, r=numbers: cllm_kernels.linear_argmax(
                    h, w, temperature=0.7, noise=(1, r, r)
                ),
            )


def jacobi_step() -> Iterator[Launch]:
    for mode in ("sliding", "block"):
        for n in (5, 64, 1000):
            yield f"{mode} n={n}", lambda mode=mode, n=n: one_step(mode, n)


def one_step(mode: str, n: int) -> torch.Tensor:
    rows = 3

    def column(value: int) -> torch.Tensor:
        return torch.full((rows,), value, device=DEVICE)

    window = torch.randint(3, 9, (rows, n), device=DEVICE)
    predictions = torch.cat([window[:, 1:], window[:, :1]], dim=1)
    predictions[1, n // 2] = 2
    output = torch.zeros(rows, 2 * n, dtype=torch.int64, device=DEVICE)
    fill = torch.randint(3, 9, (rows, 3 * n), device=DEVICE)
    done = torch.tensor([False, False, True], device=DEVICE)
    stop_ids = torch.tensor([2], device=DEVICE)
    state = (column(100), column(0), column(0), done, column(2 * n), stop_ids, fill)
    return cllm_kernels.jacobi_step(window, predictions, output, *state, mode=mode)


def guess_window() -> Iterator[Launch]:
    for n in (2, 5, 70):
        for width in (31, 2500):
            yield f"n={n} L={width}", lambda n=n, width=width: guesses(n, width)


def guesses(n: int, width: int) -> None:
    rows, vocabulary = 4, 53
    text = torch.randint(0, vocabulary, (rows, width), device=DEVICE)
    text[1, -6:] = text[1, :6]  # one row's end is found again
    window = text[:, -1:].repeat(1, n)
    latest = torch.randint(-1, 9 * vocabulary, (rows, vocabulary), device=DEVICE)
    generated = torch.tensor([width - 5, width, 1, 0], device=DEVICE)
    starts = torch.tensor([3, 0, 0, 0], device=DEVICE)
    cllm_kernels.guess_window(window, latest)
    cllm_kernels.guess_window(window, latest, text, generated, starts, longest=4, least=2)
    state = {
        "odds": torch.full((rows, 6, 2), 1024, device=DEVICE),
        "proposed": torch.full((rows, 3, n), -1, device=DEVICE),
        "since": torch.full((rows,), -1, device=DEVICE),
    }
    for more in (0, 3):  # the second call learns from the first
        grown = (generated + more).clamp(max=width)
        cllm_kernels.guess_window(window, latest, text, grown, starts, longest=4, least=2, **state)


def guess_candidates() -> Iterator[Launch]:
    for n in (2, 5, 70):
        for count in (2, 5, 32):
            yield f"n={n} C={count}", lambda n=n, count=count: candidates(n, count)


def candidates(n: int, count: int) -> None:
    rows, vocabulary, width = 4, 53, 1500
    text = torch.randint(0, vocabulary, (rows, width), device=DEVICE)
    text[1, -6:] = text[1, :6]  # one row's end is found again
    window = text[:, -1:].repeat(1, n)
    latest = torch.randint(-1, 9 * vocabulary, (rows, vocabulary), device=DEVICE)
    generated = torch.tensor([width - 5, width, 1, 0], device=DEVICE)
    rest = latest, text, generated, torch.tensor([3, 0, 0, 0], device=DEVICE)
    state = {
        "odds": torch.full((rows, 5, 2), 1024, device=DEVICE),
        "proposed": torch.full((rows, 3, n), -1, device=DEVICE),
        "since": torch.full((rows,), -1, device=DEVICE),
    }
    for own_second in (False, True):
        options = {"longest": 3, "own_second": own_second}
        cllm_kernels.guess_candidates(window, count, latest)
        cllm_kernels.guess_candidates(window, count, *rest, **options)
        cllm_kernels.guess_candidates(window, count, *rest, **options, **state)


def best_candidate() -> Iterator[Launch]:
    for rows, n in ((1, 5), (3, 1), (3, 130)):
        yield f"B={rows} n={n}", lambda rows=rows, n=n: best_of(rows, n)


def best_of(rows: int, n: int) -> None:
    tokens = [torch.randint(0, 2, (rows, 4, n), device=DEVICE) for _ in range(3)]
    cllm_kernels.best_candidate(*tokens[:2])
    cllm_kernels.best_candidate(*tokens)


def draft_window() -> Iterator[Launch]:
    for n in (1, 5, 130):
        yield f"n={n}", lambda n=n: drafted(n)


def drafted(n: int) -> None:
    rows, columns = 3, 40
    window, checked, guesses, fill = (
        torch.randint(0, 9, (rows, width), device=DEVICE) for width in (n, n, n, columns)
    )
    accepted = torch.tensor([0, 1, n], device=DEVICE)
    generated = torch.tensor([3, 0, columns], device=DEVICE)
    cllm_kernels.draft_window(window, checked, guesses, accepted, generated)
    cllm_kernels.draft_window(window, checked[:, :1].contiguous(), guesses, accepted, generated)
    cllm_kernels.draft_window(window, checked, guesses, accepted, generated, fill=fill)
    cllm_kernels.draft_window(window, checked, guesses, accepted, generated, progress=accepted)


def guess_pool_add() -> Iterator[Launch]:
    for n in (1, 5, 700):
        yield f"n={n}", lambda n=n: pooled(n)


def pooled(n: int) -> None:
    rows, vocabulary = 3, 53
    latest = torch.full((rows, vocabulary), -1, device=DEVICE)
    tokens = [torch.randint(0, vocabulary, (rows, n), device=DEVICE) for _ in range(2)]
    cllm_kernels.guess_pool_add(latest, torch.tensor([0, 1, 9], device=DEVICE), *tokens)


def block_attention() -> Iterator[Launch]:
    for dtype in DTYPES:
        for width in (64, 80, 96, 128, 256):
            for window in (None, 33):
                yield (
                    f"{dtype} D={width} window={window}",
                    lambda dtype=dtype, width=width, window=window: attend(dtype, width, window),
                )


def attend(dtype: torch.dtype, width: int, window: int | None) -> torch.Tensor:
    lengths = torch.tensor([0, 7, 700], device=DEVICE)
    rows, heads, kv_heads, block, capacity = 3, 6, 2, 5, 720
    return cllm_kernels.block_attention(
        random(rows, heads, block, width, dtype=dtype),
        random(rows, kv_heads, block, width, dtype=dtype),
        random(rows, kv_heads, block, width, dtype=dtype),
        random(rows, kv_heads, capacity, width, dtype=dtype),
        random(rows, kv_heads, capacity, width, dtype=dtype),
        lengths,
        window=window,
    )


def linear_consistency_loss() -> Iterator[Launch]:
    for dtype in DTYPES:
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            for labelled in (False, True):
                yield (
                    f"{dtype} {divergence} labels={labelled}",
                    lambda d=dtype, name=divergence, labelled=labelled: loss(d, name, labelled),
                )


def loss(dtype: torch.dtype, divergence: str, labelled: bool) -> tuple[torch.Tensor, ...]:
    rows, width, vocabulary = 7, 40, 5003
    student, teacher = (random(rows, width, dtype=dtype).requires_grad_() for _ in range(2))
    weight = random(vocabulary, width, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    labels[2] = -100
    value, _, _ = cllm_kernels.linear_consistency_loss(
        student,
        teacher,
        weight,
        divergence=divergence,
        labels=labels if labelled else None,
        label_smoothing=0.1 if labelled else 0.0,
        row_weights=torch.tensor([1.0, 0, 1, 2, 1, 1, 0], device=DEVICE),
        chunk_tokens=4,
    )
    return torch.autograd.grad(value, (student, weight))


# Every registered op must be here: one that is not makes the script fail.
LAUNCHES: dict[str, Callable[[], Iterator[Launch]]] = {
    "row_argmax": row_argmax,
    "gumbel_noise": gumbel_noise,
    "rms_norm": rms_norm,
    "block_linear": block_linear,
    "decoder_layer": decoder_layer,
    "linear_argmax": linear_argmax,
    "jacobi_step": jacobi_step,
    "guess_window": guess_window,
    "guess_candidates": guess_candidates,
    "best_candidate": best_candidate,
    "draft_window": draft_window,
    "guess_pool_add": guess_pool_add,
    "block_attention": block_attention,
    "linear_consistency_loss": linear_consistency_loss,
}


def run_op(op: Op) -> None:
    device = torch.device(DEVICE)
    for backend in ("triton", "cuda"):
        if backend not in op.implementations:
            continue
        line = {"op": op.name, "backend": backend}
        if reason := op.unavailable(backend, device):
            print(json.dumps({**line, "case": None, "error": f"unavailable: {reason}"}), flush=True)
            continue
        for case, launch in LAUNCHES[op.name]():
            error = None
            try:
                with cllm_kernels.use_backend(backend):
                    launch()
                torch.cuda.synchronize()
            except Exception as raised:  # whatever it is, it belongs in the report
                error = f"{type(raised).__name__}: {raised}"[:400]
            print(json.dumps({**line, "case": case, "error": error}), flush=True)


def main() -> None:
    torch.manual_seed(0)
    missing = set(registered()) - set(LAUNCHES)
    if missing:
        raise SystemExit(f"launches.py has no launch of {', '.join(sorted(missing))}")
    for op in registered().values():
        run_op(op)


if __name__ == "__main__":
    main()
