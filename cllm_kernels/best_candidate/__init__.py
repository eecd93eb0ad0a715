"""best_candidate: of the windows that a forward has checked, the one with most right guesses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, check_int64, eager, shape_text


def _reference() -> Any:
    from cllm_kernels.best_candidate import reference

    return reference.best_candidate


def _cpp() -> Any:
    from cllm_kernels.best_candidate import native

    return native.best_candidate_cpu


def _triton() -> Any:
    from cllm_kernels.best_candidate import triton_kernel

    return triton_kernel.best_candidate


OP = register(
    Op(
        name="best_candidate",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


class BestCandidate(NamedTuple):
    """Of every row the candidate that counts, and what belongs to it; int64 and contiguous.

    Attributes:
        candidate: [B] its number.
        window, predictions: [B, n] its.
        guesses: [B, n] its; None where none were given.
    """

    candidate: Tensor
    window: Tensor
    predictions: Tensor
    guesses: Tensor | None


def best_candidate(
    windows: Tensor, predictions: Tensor, guesses: Tensor | None = None
) -> BestCandidate:
    """Takes of every row's windows the one with the longest verified path (SpecInfer, Miao et al.
    2024, arXiv 2305.09781): with most guesses, from the first on, that are what the forward
    predicts in their places; of equals the first.

    Args (int64, contiguous, on one device):
        windows: [B, C, n]; C and n at least 1.
        predictions: [B, C, n] behind their tokens: windows[b, c, i + 1] is right where it is
            predictions[b, c, i].
        guesses: [B, C, n] or None: more that belongs to each.

    Raises:
        ValueError: a shape, layout or device that does not fit. TypeError: a wrong dtype.
        BackendError: see `use_backend`.
    """
    if windows.dim() != 3 or 0 in windows.shape[1:]:
        raise ValueError(
            "best_candidate: windows must be [B, C, n], C >= 1 and n >= 1, "
            f"not {shape_text(windows)}"
        )
    named = {"windows": windows, "predictions": predictions}
    if guesses is not None:
        named["guesses"] = guesses
    for name, tensor in named.items():
        if tensor.shape != windows.shape:
            raise ValueError(
                f"best_candidate: {name} must be {shape_text(windows)}, as windows is, "
                f"not {shape_text(tensor)}"
            )
    check_int64("best_candidate", ("windows", windows), **named)
    if eager(*named.values()):
        best, kept = OP.resolve(windows.device)(windows, predictions, guesses)
    else:
        best, kept = torch.ops.cllm_kernels.best_candidate.default(windows, predictions, guesses)
    return BestCandidate(best, kept[0], kept[1], None if guesses is None else kept[2])


LIBRARY.define(
    "best_candidate(Tensor windows, Tensor predictions, Tensor? guesses) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(
    windows: Tensor, predictions: Tensor, guesses: Tensor | None
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = OP.resolve(windows.device)(windows, predictions, guesses)
    return found


def _fake(windows: Tensor, predictions: Tensor, guesses: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, _, n = windows.shape
    return windows.new_empty(rows), windows.new_empty(2 if guesses is None else 3, rows, n)


LIBRARY.impl("best_candidate", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::best_candidate", _fake, lib=LIBRARY)
