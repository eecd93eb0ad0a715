"""The consistency loss, forward and backward: ours beside full logits, compiled chunks and Liger.

The yardstick is the time of the loss's matmuls alone (both sides' logits, dX, dW, and with labels
the clean side's dX and dW), once whole and once in our chunks; for 16-bit numbers on a CPU also in
fp32, where that is faster. Peak memory counts beyond the inputs, and beyond inputs and gradients.

    python benchmarks/kernels/linear_consistency_loss.py --device cpu --record
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels import loss_baselines as baselines
from benchmarks.kernels.cases import (
    Case,
    Inputs,
    Variant,
    compiled,
    itemsize,
    matmuls_variant,
    own_variants,
    short,
)
from benchmarks.kernels.harness import main
from benchmarks.kernels.loss_baselines import Loss
from cllm_kernels.linear_consistency_loss import OP
from cllm_kernels.linear_consistency_loss.chunked import automatic_chunk

CPU = (512, 576, 49152)  # M, H, V
CUDA = (8192, 4096, 128256)
QUICK = (12, 32, 517)
# Sizes that the compiled chunked formula may pick from.
CHUNKS = {"cpu": (64, 128, 256), "cuda": (1024, 2048, 4096), "quick": (4, 8)}

Product = tuple[str, int, int, int]  # layout, m, k, n: see matmuls_variant


def whole_matmuls(shape: tuple[int, int, int], labelled: bool) -> list[Product]:
    """Layouts and shapes of all products of one forward and backward, unchunked."""
    rows, width, vocabulary = shape
    logits = ("nt", rows, width, vocabulary)
    gradients = [("nn", rows, vocabulary, width), ("tn", vocabulary, rows, width)]
    return [logits, logits, *gradients, *(gradients if labelled else [])]


def our_matmuls(shape: tuple[int, int, int], labelled: bool, chunk: int) -> list[Product]:
    """The same work as the op does it: chunk by chunk, both sides' rows in one product."""
    rows, width, vocabulary = shape
    shapes = []
    for begin in range(0, rows, chunk):
        part = min(chunk, rows - begin)
        with_gradient = (2 if labelled else 1) * part
        shapes += [
            ("nt", 2 * part, width, vocabulary),
            ("nn", with_gradient, vocabulary, width),
            ("tn", vocabulary, with_gradient, width),
        ]
    return shapes


def make_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Any:
    def make(device: torch.device) -> Inputs:
        def hidden() -> Tensor:
            return torch.randn(rows, width, device=device)

        student = hidden()
        # a teacher near its student, as on a trajectory's last states
        teacher = (student + 0.3 * hidden()).to(dtype)
        weight = torch.randn(vocabulary, width, device=device, dtype=dtype) * (3 * width**-0.5)
        return {
            "student": student.to(dtype).requires_grad_(),
            "teacher": teacher.requires_grad_(),
            "weight": weight.requires_grad_(),
            "labels": torch.randint(0, vocabulary, (rows,), device=device),
        }

    return make


def bytes_moved(
    rows: int, width: int, vocabulary: int, size: int, loss: Loss, chunk: int
) -> dict[str, int]:
    """Bytes that each way reads and writes, counted from its formula; logits that stay in a CPU's
    cache count too."""
    logits, head, hidden = rows * vocabulary, vocabulary * width * size, rows * width * size
    sides = 2 if loss.labelled else 1  # with a gradient
    chunks = -(-rows // chunk)
    # W read for both logits and each dX, dW read and written: per chunk
    around = chunks * ((2 + sides) * head + 2 * sides * head) + (2 + 2 * sides) * hidden
    # Full logits: both sides written, read, widened, normalised (one read, one write of fp32 each);
    # the divergence reads both and writes; its gradient and log_softmax's are written and read,
    # then narrowed and read by two matmuls.
    full = logits * (sides * 3 * size + 4 * size + 4 * (2 + 4 + 4 + sides * 6))
    # In chunks: both sides written, read twice (normaliser, then gradient), gradients written once
    # and read by two matmuls.
    in_chunks = logits * size * (2 * 3 + sides * 3)
    whole = (2 + sides) * head + sides * head + (2 + 2 * sides) * hidden
    return {"full": whole + full, "chunks": around + in_chunks}


def own(loss: Loss, recompute: bool = False) -> Any:
    def formula(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cllm_kernels.linear_consistency_loss(
            student,
            teacher,
            weight,
            divergence=loss.divergence,
            labels=labels if loss.labelled else None,
            label_smoothing=loss.label_smoothing,
            ar_weight=loss.ar_weight,
            recompute=recompute,
        )[0]

    return baselines.with_gradients(formula, loss)


def case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    loss: Loss,
    device: torch.device,
    place: str,
) -> Case:
    rows, width, vocabulary = shape
    unit = rows * width * vocabulary
    flop = (12 if loss.labelled else 8) * unit
    wide = torch.float32 if device.type == "cpu" else dtype
    chunk = automatic_chunk(rows, vocabulary, wide, device)
    moved = bytes_moved(*shape, itemsize(dtype), loss, chunk)

    def formula(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return baselines.written_out(student, teacher, weight, labels, loss)

    def baseline(name: str, build: Any, what: str, why_not: str | None = None) -> Variant:
        return Variant(name, "baseline", build, flop, moved[what], unavailable=why_not)

    with_gradients = baselines.with_gradients
    no_liger = baselines.liger_missing(device, loss)
    whole = whole_matmuls(shape, loss.labelled)
    in_chunks = our_matmuls(shape, loss.labelled, chunk)
    recomputing = Variant(
        "cllm auto, recompute",
        "cllm",
        own(loss, recompute=True),
        flop + 4 * unit,
        moved["chunks"],
        "auto",
    )
    variants = [
        baseline("written out, full logits", with_gradients(formula, loss), "full"),
        baseline("compiled, full logits", with_gradients(compiled(formula), loss), "full"),
        baseline("compiled, in chunks", baselines.chunked(loss, CHUNKS[place]), "chunks"),
        baseline("Liger fused linear JSD", baselines.liger_jsd(loss), "chunks", no_liger),
        baseline(
            "Liger chunked distillation", baselines.liger_distillation(loss), "chunks", no_liger
        ),
        *own_variants(OP, device, own(loss), flop, moved["chunks"]),
        recomputing,
        matmuls_variant("matmuls alone", whole, dtype, device),
        matmuls_variant("matmuls alone, in chunks", in_chunks, dtype, device),
    ]
    if device.type == "cpu" and dtype is not torch.float32:
        variants += [
            baseline(
                "compiled, in chunks, fp32",
                baselines.chunked(loss, CHUNKS[place], widened=True),
                "chunks",
            ),
            matmuls_variant("matmuls alone, fp32", whole, torch.float32, device),
        ]
    labelled = " with labels" if loss.labelled else ""
    return Case(
        name=f"{short(dtype)} {loss.divergence}{labelled} M={rows} H={width} V={vocabulary}",
        dtype=dtype,
        shape={"M": rows, "H": width, "V": vocabulary, **vars(loss)},
        make_inputs=make_inputs(*shape, dtype),
        variants=variants,
        flop_floor=flop,
        bytes_floor=(2 * vocabulary + (4 if loss.labelled else 3) * rows) * width * itemsize(dtype),
        tolerance=1e-3 if dtype is torch.float32 else 5e-2,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    on_gpu = device.type == "cuda"
    shape = QUICK if quick else CUDA if on_gpu else CPU
    place = "quick" if quick else device.type
    kl = Loss()
    labelled = Loss(labelled=True, label_smoothing=0.1)
    jsd = Loss(divergence="jsd")
    if on_gpu:
        wanted = [(torch.bfloat16, loss) for loss in (kl, jsd, labelled)]
    else:
        wanted = [(torch.float32, loss) for loss in (kl, jsd, labelled)] + [(torch.bfloat16, kl)]
    return [case(shape, dtype, loss, device, place) for dtype, loss in wanted]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("linear_consistency_loss", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
