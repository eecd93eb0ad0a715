"""gumbel_noise: counter-based Gumbel noise, the same bits on every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, eager
from cllm_kernels.gumbel_noise.arguments import Ids, Seed, check_row_ids, noise_tensors


def _reference() -> Any:
    from cllm_kernels.gumbel_noise import reference

    return reference.gumbel_noise


def _cpp() -> Any:
    from cllm_kernels.gumbel_noise import native

    return native.gumbel_noise_cpu


def _triton() -> Any:
    from cllm_kernels.gumbel_noise import triton_kernel

    return triton_kernel.gumbel_noise


OP = register(
    Op(
        name="gumbel_noise",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def gumbel_noise(seed: Seed, row: Ids, position: Ids, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for each entry of the vocabulary, a function of its key alone.

    argmax over v of (logits[v] / temperature + noise[v]) is an exact sample from
    softmax(logits / temperature) (Gumbel-max; Maddison et al. 2014, "A* sampling", sec. 2.1). The
    noise of an entry depends on (seed, row, position, entry) and on nothing else: not on the other
    rows, the size of the vocabulary, the device or the backend, all of which give the same bits.
    Philox4x32-10 (Salmon et al. 2011) makes them; `reference.py` says which word goes where.

    Args:
        seed: an int of 64 bits, or an int64 tensor, [] or [1] (which a CUDA graph reads anew at
            every replay).
        row: [M] int64, the id of each row's sequence, below 2^32 (on a GPU unchecked: the low 32
            bits count); or an int for all rows.
        position: [M] int64, the place in the sequence of the token to be drawn; or an int for all.
        vocabulary: V, at least 1.

    Returns:
        [M, V] float32 on the device of row and position, between -3.14 and 22.9.

    Raises:
        ValueError: shapes or devices that do not fit, a number out of range, no tensor among row
            and position. TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    shape_giver = row if isinstance(row, Tensor) else position
    if not isinstance(shape_giver, Tensor):
        raise ValueError("gumbel_noise: one of row and position must be a tensor, [M]")
    if vocabulary < 1:
        raise ValueError(f"gumbel_noise: vocabulary must be at least 1, not {vocabulary}")
    rows = shape_giver.shape[0] if shape_giver.dim() == 1 else 0
    tensors = noise_tensors("gumbel_noise", seed, row, position, rows, shape_giver.device)
    if eager(*tensors):
        return _dispatched(*tensors, vocabulary)
    return torch.ops.cllm_kernels.gumbel_noise.default(*tensors, vocabulary)


# `seed` stays a tensor in the schema: a number would be compiled in.
LIBRARY.define(
    "gumbel_noise(Tensor seed, Tensor row, Tensor position, SymInt vocabulary) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(seed: Tensor, row: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    check_row_ids("gumbel_noise", row)
    return OP.resolve(row.device)(seed, row, position, vocabulary)


def _fake(seed: Tensor, row: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    return row.new_empty((row.shape[0], vocabulary), dtype=torch.float32)


LIBRARY.impl("gumbel_noise", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::gumbel_noise", _fake, lib=LIBRARY)
