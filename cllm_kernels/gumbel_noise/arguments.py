"""What (seed, row, position) may be, and the three tensors that the kernels take."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from cllm_kernels._common import dtype_text, shape_text

Seed: TypeAlias = int | Tensor  # [] or [1] int64
Ids: TypeAlias = int | Tensor  # [M] int64

_LIMITS = {"row": (0, 2**32), "position": (0, 2**63)}


def noise_tensors(
    op: str, seed: Seed, row: Ids, position: Ids, rows: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """seed [1], row [rows] and position [rows], int64 and contiguous, on the device.

    `op` begins the message of an error, which is a ValueError or, for a wrong dtype, a TypeError.
    """
    return (
        _seed(op, seed, device),
        _ids(op, "row", row, rows, device),
        _ids(op, "position", position, rows, device),
    )


def _seed(op: str, seed: Seed, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dim() > 1:
            raise ValueError(
                f"{op}: seed must be an int or a tensor [] or [1], not {shape_text(seed)}"
            )
        _check_tensor(op, "seed", seed, device)
        return seed.reshape(1)
    if not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, not {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must fit 64 bits, which {seed} does not")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, device=device)


def _ids(op: str, name: str, ids: Ids, rows: int, device: torch.device) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.shape[0] != rows:
            raise ValueError(
                f"{op}: {name} must be [{rows}], one entry per row, or an int, "
                f"not {shape_text(ids)}"
            )
        _check_tensor(op, name, ids, device)
        return ids.contiguous()
    if not isinstance(ids, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int or an int64 tensor, not {type(ids).__name__}")
    low, high = _LIMITS[name]
    if not low <= ids < high:
        raise ValueError(
            f"{op}: {name} must be at least 0 and fit {high.bit_length() - 1} bits, "
            f"which {ids} does not"
        )
    return torch.full((rows,), ids, dtype=torch.int64, device=device)


def _check_tensor(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be int64, not {dtype_text(tensor.dtype)}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but must be on {device}")


def check_row_ids(op: str, row: Tensor) -> None:
    """ValueError if a row id [M] does not fit 32 bits; on a GPU asking would make the host wait."""
    if row.device.type == "cpu" and row.numel():
        low, high = torch.aminmax(row)
        if low < 0 or high >= 2**32:
            wrong = int(low) if low < 0 else int(high)
            raise ValueError(f"{op}: row ids must fit 32 bits, which {wrong} does not")
