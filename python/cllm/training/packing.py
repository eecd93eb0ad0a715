"""Batches of packed rows: samples (`packed_sample`) side by side in the rows of a few tensors.

In gated batches the noisy columns of all rows begin at the same column, so that clean and noisy
ones can go through the model one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import ConsistencyConfig
from .packed_sample import IGNORED, PackedSample, pack_sample
from .sampling import SampledExample

TOKEN_FIELDS = ("input_ids", "position_ids", "sample_ids", "segment_ids", "visible")
ROW_FIELDS = ("student_index", "teacher_index", "row_weights", "teacher_labels")
CLEAN_FIELDS = ("clean_index", "clean_labels")


@dataclass(frozen=True)
class BatchStatistics:
    """Tokens of one batch.

    Attributes:
        samples: responses.
        clean: clean tokens forwarded (prompt and response).
        noisy: noisy tokens forwarded.
        nominal: noisy tokens as the paper counts them, the whole block of every sampled state.
        rows: counted rows of the consistency loss.
        labels: response tokens, the labels of the autoregressive loss.
        columns: tokens of the batch, padding included.
    """

    samples: int
    clean: int
    noisy: int
    nominal: int
    rows: int
    labels: int
    columns: int


def batch_statistics(batch: dict[str, Tensor]) -> BatchStatistics:
    """Count a batch of `ConsistencyCollator`. Best before it is moved: on a GPU this waits."""
    there, noisy = batch["sample_ids"] >= 0, batch["segment_ids"] > 0
    labelled = (batch["teacher_labels"] >= 0).sum() + (batch["clean_labels"] >= 0).sum()
    return BatchStatistics(
        samples=int((batch["sample_ids"].max(dim=1).values + 1).sum()),
        clean=int((there & ~noisy).sum()),
        noisy=int(noisy.sum()),
        nominal=int(batch["nominal_tokens"].sum()),
        rows=int((batch["row_weights"] > 0).sum()),
        labels=int(labelled),
        columns=there.numel(),
    )


class ConsistencyCollator:
    """Packs `SampledExample`s into the batch that a model under `patch_training` takes.

    A batch is a dict, B rows of S columns, padded to few different shapes:

        input_ids, position_ids [B, S] int64
        sample_ids [B, S] int64: -1 where padding
        segment_ids [B, S] int64: 0 clean, from 1 on the noisy segments of a row
        visible [B, S] int64: clean tokens of its sample that a token may attend to
        student_index, teacher_index [B, R] int64: columns of each counted row and its teacher
        row_weights [B, R] float32: 1 (`row_decay` gives less), or 0 where padding
        row_numbers [B, R] int64: the data set's number of the response, or -1
        teacher_labels [B, R] int64: the teacher row's next token where that row must count for the
            autoregressive loss, else -100
        clean_index, clean_labels [B, Q] int64: the other rows of the autoregressive loss
        nominal_tokens [B] int64: tokens of the sampled states as the paper counts them, the whole
            block of each (for statistics only)

    Args:
        config: `consistency`, `gated` and `row_decay` of it are used.
        pad_token_id: stands in padded columns; any token will do.
        samples_per_row: most samples of one row; None: as many as `max_columns` holds.
        max_columns: most columns of a row; None: no limit. Samples are put, longest first, into the
            first row that has room, so B is at most their number.
        context: positions that the model has; a longer text is refused.
        column_multiple: S is a multiple of it (128 suits FlexAttention); R and Q are multiples of
            `row_multiple`.

    Raises:
        ValueError: for settings that are no positive integers.
    """

    def __init__(
        self,
        config: ConsistencyConfig,
        pad_token_id: int = 0,
        *,
        samples_per_row: int | None = 1,
        max_columns: int | None = None,
        context: int | None = None,
        column_multiple: int = 64,
        row_multiple: int = 16,
    ):
        for name, value, optional in (
            ("samples_per_row", samples_per_row, True),
            ("max_columns", max_columns, True),
            ("context", context, True),
            ("column_multiple", column_multiple, False),
            ("row_multiple", row_multiple, False),
        ):
            if not (value is None and optional) and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
        if samples_per_row is None and max_columns is None:
            raise ValueError(
                "samples_per_row=None needs max_columns, which says when a row is full"
            )
        self.local = config.consistency == "local"
        self.gated = config.gated
        self.row_decay = config.row_decay
        self.pad_token_id = pad_token_id
        self.samples_per_row = samples_per_row
        self.max_columns = max_columns
        self.context = context
        self.column_multiple = column_multiple
        self.row_multiple = row_multiple

    def __call__(self, samples: Sequence[SampledExample]) -> dict[str, Tensor]:
        """The batch of `samples`.

        Raises:
            ValueError: no samples, one that is longer than the model's context or than a row, or
                one whose parts do not fit each other.
        """
        assigned = self.assigned(samples)
        columns, rows_of = self.column_multiple, self.row_multiple
        clean = 0
        if self.gated:
            longest = max(sum(len(sample.clean) for sample in row) for row in assigned)
            clean = -(-longest // columns) * columns
        rows = [_row(row, clean, self.pad_token_id) for row in assigned]
        return {
            name: _padded([row[name] for row in rows], fill, dtype, multiple)
            for name, fill, dtype, multiple in (
                ("input_ids", self.pad_token_id, np.int64, columns),
                ("position_ids", 0, np.int64, columns),
                ("sample_ids", -1, np.int64, columns),
                ("segment_ids", 0, np.int64, columns),
                ("visible", 0, np.int64, columns),
                ("student_index", 0, np.int64, rows_of),
                ("teacher_index", 0, np.int64, rows_of),
                ("row_weights", 0.0, np.float32, rows_of),
                ("teacher_labels", IGNORED, np.int64, rows_of),
                ("row_numbers", -1, np.int64, rows_of),
                ("clean_index", 0, np.int64, rows_of),
                ("clean_labels", IGNORED, np.int64, rows_of),
            )
        } | {"nominal_tokens": torch.tensor([row["nominal_tokens"] for row in rows])}

    def assigned(self, samples: Sequence[SampledExample]) -> list[list[PackedSample]]:
        """Which samples share a row: first fit, longest first."""
        if not samples:
            raise ValueError("a batch needs at least one sample")
        packed = [self._packed(sample) for sample in samples]
        rows: list[list[PackedSample]] = []
        taken: list[int] = []  # columns of each row
        sized = [(sample.columns, sample) for sample in packed]
        for columns, sample in sorted(sized, key=lambda pair: -pair[0]):
            for number, row in enumerate(rows):
                full = self.samples_per_row is not None and len(row) >= self.samples_per_row
                fits = self.max_columns is None or taken[number] + columns <= self.max_columns
                if fits and not full:
                    row.append(sample)
                    taken[number] += columns
                    break
            else:
                rows.append([sample])
                taken.append(columns)
        return rows

    def _packed(self, sample: SampledExample) -> PackedSample:
        packed = pack_sample(sample, self.local, self.gated, self.row_decay)
        example = sample.example
        length = len(example.prompt) + len(example.response)
        if self.context is not None and length > self.context:
            raise ValueError(
                f"example {example.id!r} has {len(example.prompt)} prompt and "
                f"{len(example.response)} response tokens, more than the model's context of "
                f"{self.context}; leave it out or shorten it"
            )
        if self.max_columns is not None and packed.columns > self.max_columns:
            raise ValueError(
                f"example {example.id!r} needs {packed.columns} columns ({packed.noisy} of them "
                f"noisy), more than max_columns={self.max_columns}; raise it or sample fewer states"
            )
        return packed


def _row(samples: list[PackedSample], clean: int, pad: int) -> dict[str, Any]:
    """The columns and rows of one row of the batch, its first `clean` columns padded with `pad`.

    Returns:
        Of each field an array or list [columns], [rows] or [clean rows]; of nominal_tokens the sum.
    """
    # (sample, segment, position of the first token, tokens) of each stretch of columns
    stretches = [(number, 0, 0, len(sample.clean)) for number, sample in enumerate(samples)]
    padding = max(0, clean - sum(len(sample.clean) for sample in samples))
    stretches.append((-1, 0, 0, padding))
    tokens = [*chain.from_iterable(sample.clean for sample in samples), *[pad] * padding]
    read = len(tokens) - padding
    for number, sample in enumerate(samples):
        for first, guesses in sample.segments:
            segment = len(stretches) - len(samples)
            stretches.append((number, segment, first, len(guesses)))
            tokens += guesses
    numbers, segments, firsts, lengths = np.array(stretches, dtype=np.int64).T
    origins = lengths.cumsum() - lengths - firsts  # column of the stretch's position 0
    position_ids = np.arange(len(tokens)) - origins.repeat(lengths)
    visible = firsts.repeat(lengths)
    visible[:read] = position_ids[:read] + 1
    row: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": position_ids,
        "sample_ids": numbers.repeat(lengths),
        "segment_ids": segments.repeat(lengths),
        "visible": visible,
        "nominal_tokens": sum(sample.nominal for sample in samples),
    }
    names = "student_index", "teacher_index", "teacher_labels", "row_weights", "row_numbers"
    for name in (*names, *CLEAN_FIELDS):
        row[name] = []
    column = origins.tolist()
    behind = len(samples) + 1  # the first noisy stretch
    for number, sample in enumerate(samples):
        # of each segment of the sample, the clean one first
        place = [column[number], *column[behind : behind + len(sample.segments)]]
        behind += len(sample.segments)
        for name, owners in (
            ("student_index", sample.students),
            ("teacher_index", sample.teachers),
        ):
            places = zip(owners, sample.positions, strict=True)
            row[name] += [place[own] + position for own, position in places]
        row["teacher_labels"] += sample.taught
        row["row_weights"] += sample.weights
        row["row_numbers"] += [sample.number] * len(sample.positions)
        row["clean_index"] += [place[0] + position for position, _ in sample.labels]
        row["clean_labels"] += [label for _, label in sample.labels]
    return row


def _padded(
    rows: list[list[Any] | NDArray[Any]], fill: float, dtype: type[np.generic], multiple: int
) -> Tensor:
    """[B, width], the width the smallest multiple that holds every row; at least one."""
    longest = max(1, max(map(len, rows)))
    width = -(-longest // multiple) * multiple
    batch = np.full((len(rows), width), fill, dtype)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = row
    return torch.from_numpy(batch)
