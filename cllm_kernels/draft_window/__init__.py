"""draft_window: the next window of a row, with an adapter's guesses in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, check_int64, eager, shape_text


def _reference() -> Any:
    from cllm_kernels.draft_window import reference

    return reference.draft_window


def _cpp() -> Any:
    from cllm_kernels.draft_window import native

    return native.draft_window_cpu


def _triton() -> Any:
    from cllm_kernels.draft_window import triton_kernel

    return triton_kernel.draft_window


OP = register(
    Op(
        name="draft_window",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def draft_window(
    window: Tensor,
    checked: Tensor,
    guesses: Tensor,
    accepted: Tensor,
    generated: Tensor,
    progress: Tensor | None = None,
    fill: Tensor | None = None,
) -> None:
    """Makes the window that follows a `jacobi_step`, with what an adapter has guessed in place of
    the predictions left over: guess i of a window is the one for the place behind its token i.

    Rows that have ended get some window.

    Args (int64, contiguous, on one device; B rows):
        window: [B, n], written; it overlaps none of the others.
        checked: [B, v] what `jacobi_step` has made of the tokens that were checked, v from 1 to n:
            its first is the last committed one; with `progress`, the first 1 + progress are exact.
        guesses: [B, n] behind every token of the window that was fed.
        accepted: [B] what `jacobi_step` returned: so far has a sliding window moved on.
        generated: [B] tokens committed to the output, behind that step.
        progress: [B] in block mode, for which v = n: exact predictions of an unfinished block,
            which keeps its place; 0 where a block has ended, whose window is `checked`. None: in
            sliding mode.
        fill: [B, F] or None: the guess for each absolute output position behind the last guess
            (reads beyond F - 1 repeat the last column). None: the last guess is repeated.

    Raises:
        ValueError: a shape, layout or device that does not fit. TypeError: a wrong dtype.
        BackendError: see `use_backend`.
    """
    if window.dim() != 2 or window.shape[1] < 1:
        raise ValueError(f"draft_window: window must be [B, n], n >= 1, not {shape_text(window)}")
    rows, n = window.shape
    named = {"checked": checked, "guesses": guesses, "accepted": accepted, "generated": generated}
    if progress is not None:
        named["progress"] = progress
    if fill is not None:
        named["fill"] = fill
    for name, tensor in named.items():
        if not _fits(name, tensor, rows, n, blocks=progress is not None):
            wanted = {
                "checked": f"[{rows}, {n}]" if progress is not None else f"[{rows}, v], v 1 to {n}",
                "guesses": f"[{rows}, {n}], the window's shape",
                "fill": f"[{rows}, F], F >= 1",
            }.get(name, f"[{rows}], one entry per row of window")
            raise ValueError(f"draft_window: {name} must be {wanted}, not {shape_text(tensor)}")
    check_int64("draft_window", ("window", window), window=window, **named)
    arguments = (window, checked, guesses, accepted, generated, progress, fill)
    if eager(window, *named.values()):
        OP.resolve(window.device)(*arguments)
    else:
        torch.ops.cllm_kernels.draft_window.default(*arguments)


def _fits(name: str, tensor: Tensor, rows: int, n: int, *, blocks: bool) -> bool:
    if name not in ("checked", "guesses", "fill"):
        return tensor.shape == (rows,)
    if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] < 1:
        return False
    width = tensor.shape[1]
    if name == "checked":
        return width == n or (width < n and not blocks)
    return name == "fill" or width == n


LIBRARY.define(
    "draft_window(Tensor(a!) window, Tensor checked, Tensor guesses, Tensor accepted, "
    "Tensor generated, Tensor? progress, Tensor? fill) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(window: Tensor, *rest: Any) -> None:
    OP.resolve(window.device)(window, *rest)


def _fake(*_: Any) -> None:
    return None


LIBRARY.impl("draft_window", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::draft_window", _fake, lib=LIBRARY)
