"""One forward for whole responses: clean text once, and behind it the noisy states of its blocks.

A row of the batch is

    [x1 l1 | x2 l2 | ... | noisy segment 1 | noisy segment 2 | ... | padding]

with the clean tokens of all its samples first. The state y of a block that starts at token s of
response l, and whose first wrong token is y_d, is the segment y_d .. y_{m-2} (m: the block's
length): what lies before d equals l, so its rows would be the clean ones, and the last token is
nobody's input. Input y_i keeps the position of l_{s+i}; it attends to the clean tokens before
position P + s + d and causally to its own segment. Its row predicts token s + i + 1, and so does
its teacher's: the clean row l_{s+i} (global consistency), or y'_i of the next state (local), which
is the clean row too as long as y' is right up to there.

Where the noisy columns alone have an adapter (`gated`), the segment is l_{s+d-1} y_d .. y_{m-2}:
the last right token too, since decoding gives a window's first, committed token to the adapter as
well. It attends to the clean tokens before itself, and its row is not counted.

A state that is a window of sliding decoding (`SampledExample.tails`) keeps its last token, and goes
on with a state of the next block until it has n tokens, the last right one counted. A window that
decoding visits (`SampledExample.windows`) is a segment as it stands, right guesses included, and the
rows count whose predictions are the next window's guesses.

In gated batches the noisy columns of all rows begin at the same column, so that clean and noisy ones
can go through the model one after the other.

Every token of the response is a label once. The last one is never an input, so it has no column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import ConsistencyConfig
from .examples import first_difference
from .sampling import SampledExample

IGNORED = -100

TOKEN_FIELDS = ("input_ids", "position_ids", "sample_ids", "segment_ids", "visible")
ROW_FIELDS = ("student_index", "teacher_index", "row_weights", "teacher_labels")
CLEAN_FIELDS = ("clean_index", "clean_labels")
_FIELDS = (*TOKEN_FIELDS, *ROW_FIELDS, *CLEAN_FIELDS, "row_numbers", "nominal_tokens")


@dataclass
class PackedSample:
    """One sample, with columns counted from its own first clean token and segments from 1.

    Attributes:
        clean: [C] tokens x + l without the last.
        segments: (visible, tokens) of each noisy segment, `visible` also its first position.
        rows: (student, teacher, label) per counted row. A place is (segment, position), segment 0
            being the clean text; the label is IGNORED where the teacher is noisy or seen before.
        weights: of each counted row.
        number: of the data set's row (`SampledExample.number`).
        labels: (position, token) of the clean rows that are nobody's teacher.
        nominal: tokens of the sampled states as the paper counts them, n a state.
    """

    clean: list[int]
    segments: list[tuple[int, list[int]]] = field(default_factory=list)
    rows: list[tuple[tuple[int, int], tuple[int, int], int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    number: int = -1
    labels: list[tuple[int, int]] = field(default_factory=list)
    nominal: int = 0

    @property
    def noisy(self) -> int:
        """Noisy tokens that are forwarded."""
        return sum(len(tokens) for _, tokens in self.segments)

    @property
    def columns(self) -> int:
        return len(self.clean) + self.noisy


def pack_sample(
    sample: SampledExample, local: bool = False, gated: bool = False, row_decay: float = 1.0
) -> PackedSample:
    """Lay out one response and its sampled states.

    Args:
        local: teach with the next state (CLLM, arXiv 2403.00835, eq. 7), not the fixed point.
        gated: start every segment with the last right token.
        row_decay: of `ConsistencyConfig`.

    Raises:
        ValueError: an example whose parts do not fit each other.
    """
    example = sample.example
    check_example(sample)
    prompt, text = len(example.prompt), [*example.prompt, *example.response]
    packed = PackedSample(clean=text[:-1], number=sample.number)
    numbers: dict[tuple[int, int], int] = {}

    def segment_of(entry: int, state: int) -> tuple[int, int, int]:
        """(segment, first wrong token, guesses) of a state; its segment is made when first asked
        for."""
        wrong, guesses = _guesses(sample, entry, state)
        if guesses and (entry, state) not in numbers:
            first = prompt + example.block_start(entry) + wrong
            # there is a token before it: a prompt is never empty
            lead = [text[first - 1]] if gated else []
            packed.segments.append((first - len(lead), lead + guesses))
            numbers[entry, state] = len(packed.segments)
        return numbers.get((entry, state), 0), wrong, len(guesses)

    taught: set[int] = set()

    def add_row(segment: int, position: int, teacher: int, weight: float = 1.0) -> None:
        label = IGNORED
        if teacher == 0 and position not in taught:
            taught.add(position)
            label = text[position + 1]
        packed.rows.append(((segment, position), (teacher, position), label))
        packed.weights.append(weight)

    for window in sample.windows:
        rows = window.rows(text)
        if rows:
            packed.segments.append((window.start, window.inputs(text)))
            packed.nominal += 1 + len(window.guesses)
        for distance, row in enumerate(rows):
            add_row(len(packed.segments), window.start + row, 0, row_decay**distance)
    for entry, state in sample.picks:
        start, length = prompt + example.block_start(entry), len(example.blocks[entry].fixed_point)
        packed.nominal += length
        segment, wrong, count = segment_of(entry, state)
        next_segment, next_wrong, _ = segment_of(entry, state + 1) if local else (0, len(text), 0)
        for position in range(start + wrong, start + wrong + count):
            add_row(segment, position, 0 if position < start + next_wrong else next_segment)
    if sample.windows:  # of an adapter alone: no text is trained
        return packed
    packed.labels = [
        (position, text[position + 1])
        for position in range(prompt - 1, len(text) - 1)
        if position not in taught
    ]
    return packed


def _guesses(sample: SampledExample, entry: int, state: int) -> tuple[int, list[int]]:
    """The first wrong token of a state, counted in its block, and the inputs from there on."""
    example, block = sample.example, sample.example.blocks[entry]
    tokens = block.states[state]
    wrong = first_difference(tokens, block.fixed_point)
    if (entry, state) not in sample.tails:
        return wrong, tokens[wrong:-1]
    tail = sample.tails[entry, state]
    following = [] if tail is None else example.blocks[entry + 1].states[tail]
    # n tokens with the last right one, and the response's last token is nobody's input
    last = len(example.response) - 1 - example.block_start(entry)
    end = min(wrong + example.block_size - 1, last)
    return wrong, [*tokens, *following][wrong:end]


def check_example(sample: SampledExample) -> None:
    """Refuse an example whose prompt, response, blocks and picks do not belong together."""
    example = sample.example
    name = f"example {example.id!r}"
    if not example.prompt or not example.response:
        part = "response" if example.prompt else "prompt"
        raise ValueError(f"{name} has an empty {part}; leave it out of the data set")
    for entry, block in enumerate(example.blocks):
        start = example.block_start(entry)
        text = example.response[start : start + example.block_size]
        lengths = {len(state) for state in block.states}
        if lengths != {len(text)}:
            raise ValueError(
                f"{name}: block {example.block_index[entry]} has states of "
                f"{', '.join(map(str, sorted(lengths)))} tokens, but the response of "
                f"{len(example.response)} tokens has {len(text)} there (block_size "
                f"{example.block_size})"
            )
        if block.fixed_point != text:
            raise ValueError(
                f"{name}: the fixed point of block {example.block_index[entry]} is not the "
                "response's text there; collect its trajectories again"
            )
    for (entry, _), tail in sample.tails.items():
        if tail is None:
            continue
        follows = example.block_index[entry + 1 : entry + 2] == [example.block_index[entry] + 1]
        if not follows or not 0 <= tail < len(example.blocks[entry + 1].states):
            raise ValueError(
                f"{name}: block entry {entry} cannot go on with state {tail} of the next block, "
                "which has no such state or is not there"
            )
    for entry, state in sample.picks:
        if not (
            0 <= entry < len(example.blocks) and 0 <= state < len(example.blocks[entry].states)
        ):
            raise ValueError(f"{name} has no state {state} of block entry {entry}")
        if state == len(example.blocks[entry].states) - 1:
            raise ValueError(
                f"{name}: state {state} of block entry {entry} is its fixed point, which has "
                "nothing to learn; pick an earlier state"
            )


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


def forwarded_tokens(
    sample: SampledExample, local: bool = False, gated: bool = False
) -> tuple[int, int]:
    """Tokens that a training step forwards for one response.

    Returns:
        (packed: clean text and trimmed noisy segments, once; separate: for every sampled state
        three forwards of the text before its block and the block: the state, its teacher, and the
        text of the autoregressive loss, as the code published with arXiv 2403.00835 does).
    """
    example = sample.example
    separate = sum(
        3
        * (len(example.prompt) + example.block_start(entry) + len(example.blocks[entry].states[0]))
        for entry, _ in sample.picks
    )
    return pack_sample(sample, local, gated).columns, separate


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
                ("input_ids", self.pad_token_id, torch.int64, columns),
                ("position_ids", 0, torch.int64, columns),
                ("sample_ids", -1, torch.int64, columns),
                ("segment_ids", 0, torch.int64, columns),
                ("visible", 0, torch.int64, columns),
                ("student_index", 0, torch.int64, rows_of),
                ("teacher_index", 0, torch.int64, rows_of),
                ("row_weights", 0.0, torch.float32, rows_of),
                ("teacher_labels", IGNORED, torch.int64, rows_of),
                ("row_numbers", -1, torch.int64, rows_of),
                ("clean_index", 0, torch.int64, rows_of),
                ("clean_labels", IGNORED, torch.int64, rows_of),
            )
        } | {"nominal_tokens": torch.tensor([sum(row["nominal_tokens"]) for row in rows])}

    def assigned(self, samples: Sequence[SampledExample]) -> list[list[PackedSample]]:
        """Which samples share a row: first fit, longest first."""
        if not samples:
            raise ValueError("a batch needs at least one sample")
        packed = [self._packed(sample) for sample in samples]
        rows: list[list[PackedSample]] = []
        for sample in sorted(packed, key=lambda sample: -sample.columns):
            for row in rows:
                full = self.samples_per_row is not None and len(row) >= self.samples_per_row
                columns = sample.columns + sum(other.columns for other in row)
                if not full and (self.max_columns is None or columns <= self.max_columns):
                    row.append(sample)
                    break
            else:
                rows.append([sample])
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


def _row(samples: list[PackedSample], clean: int, pad: int) -> dict[str, list[Any]]:
    """The columns and rows of one row of the batch, its first `clean` columns padded with `pad`."""
    row: dict[str, list[Any]] = {name: [] for name in _FIELDS}
    places: list[dict[int, int]] = []  # of each sample: segment -> column of its position 0

    def add(number: int, segment: int, first: int, tokens: list[int], visible: Any) -> int:
        column = len(row["input_ids"])
        row["input_ids"] += tokens
        row["position_ids"] += range(first, first + len(tokens))
        row["sample_ids"] += [number] * len(tokens)
        row["segment_ids"] += [segment] * len(tokens)
        row["visible"] += visible
        return column - first

    for number, sample in enumerate(samples):
        length = len(sample.clean)
        places.append({0: add(number, 0, 0, sample.clean, range(1, length + 1))})
    padding = max(0, clean - len(row["input_ids"]))
    add(-1, 0, 0, [pad] * padding, [0] * padding)
    segment = 0
    for number, sample in enumerate(samples):
        for own, (first, tokens) in enumerate(sample.segments, start=1):
            segment += 1
            visible = [first] * len(tokens)
            places[number][own] = add(number, segment, first, tokens, visible)
    for place, sample in zip(places, samples, strict=True):
        for (student, teacher, label), weight in zip(sample.rows, sample.weights, strict=True):
            row["student_index"].append(place[student[0]] + student[1])
            row["teacher_index"].append(place[teacher[0]] + teacher[1])
            row["row_weights"].append(weight)
            row["teacher_labels"].append(label)
            row["row_numbers"].append(sample.number)
        for position, label in sample.labels:
            row["clean_index"].append(place[0] + position)
            row["clean_labels"].append(label)
        row["nominal_tokens"].append(sample.nominal)
    return row


def _padded(rows: list[list[Any]], fill: float, dtype: torch.dtype, multiple: int) -> Tensor:
    """[B, width], the width the smallest multiple that holds every row; at least one."""
    longest = max(1, max(map(len, rows)))
    width = -(-longest // multiple) * multiple
    batch = torch.full((len(rows), width), fill, dtype=dtype)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = torch.tensor(row, dtype=dtype)
    return batch
