"""Exact sampling: the noise of every token of every text is fixed before the text is known.

One-token sampling draws the token at a place from softmax(scores). By the Gumbel-max trick the
argmax of scores + noise is such a draw, and with noise that is a function of (seed, row, place,
entry of the vocabulary) alone the token at a place is a function of its prefix: sampling with a key
is greedy search over other scores, and Jacobi iteration finds its text as it finds any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import cllm_kernels

_ROWS = 2**32


@dataclass(frozen=True)
class SamplingNoise:
    """The key of a call's noise, `cllm_kernels.gumbel_noise` of (seed, row, place).

    Attributes:
        seed: a number of 63 bits.
        rows: [B] int64, the id of each row's noise.
        starts: [B] int64, first column of every row's text: places count from there, so padding
            changes nothing.
    """

    seed: int
    rows: torch.Tensor
    starts: torch.Tensor

    def key(self, columns: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(seed, row [B * n], place [B * n]) of the tokens in `columns` [B, n] of the output."""
        places = columns - self.starts[:, None]
        return self.seed, self.rows[:, None].expand_as(places).flatten(), places.flatten()

    def at(self, columns: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """[B, n, V] fp32 for the tokens in `columns` [B, n] of the output."""
        noise = cllm_kernels.gumbel_noise(*self.key(columns), vocabulary)
        return noise.view(*columns.shape, vocabulary)


def drawn_seed(generator: torch.Generator | None) -> int:
    """A seed from `generator`, or from torch's own generator, which ``torch.manual_seed`` seeds.

    Raises:
        TypeError: what is given is no generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def noise_rows(
    row_ids: Sequence[int] | torch.Tensor | None, batch: int, device: torch.device
) -> torch.Tensor:
    """[B] int64: `row_ids`, or the rows' places in the batch.

    Raises:
        ValueError: not one id a row, or one that does not fit 32 bits.
    """
    if row_ids is None:
        return torch.arange(batch, device=device)
    given = torch.as_tensor(row_ids)
    if given.shape != (batch,) or given.dtype.is_floating_point or given.dtype is torch.bool:
        raise ValueError(
            f"row_ids must be {batch} integers, one for each row (of num_return_sequences, too), "
            f"not {row_ids!r}"
        )
    given = given.to(torch.int64)
    if int(given.min()) < 0 or int(given.max()) >= _ROWS:
        raise ValueError(f"row_ids must lie in [0, 2**32), not {given.tolist()!r}")
    return given.to(device)
