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
decoding visits (`SampledExample.windows`) is a segment as it stands, right guesses included; those
rows count whose predictions are the next window's guesses.

Every token of the response is a label once. The last one is never an input, so it has no column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .examples import first_difference
from .sampling import SampledExample

IGNORED = -100


@dataclass
class PackedSample:
    """One sample, with columns counted from its own first clean token and segments from 1.

    Attributes:
        clean: [C] tokens x + l without the last.
        segments: (visible, tokens) of each noisy segment, `visible` also its first position.
        positions: of each counted row, and of its teacher.
        students, teachers: the segments that they are in, 0 being the clean text.
        taught: the teacher's next token, IGNORED where the teacher is noisy or seen before.
        weights: of each counted row.
        number: of the data set's row (`SampledExample.number`).
        labels: (position, token) of the clean rows that are nobody's teacher.
        nominal: tokens of the sampled states as the paper counts them, n a state.
    """

    clean: list[int]
    segments: list[tuple[int, list[int]]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    students: list[int] = field(default_factory=list)
    teachers: list[int] = field(default_factory=list)
    taught: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    number: int = -1
    labels: list[tuple[int, int]] = field(default_factory=list)
    nominal: int = 0

    @property
    def rows(self) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
        """(student, teacher, label) of each counted row, a place being (segment, position)."""
        students = zip(self.students, self.positions, strict=True)
        teachers = zip(self.teachers, self.positions, strict=True)
        return list(zip(students, teachers, self.taught, strict=True))

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

    longest = max((len(window.guesses) for window in sample.windows), default=0)
    decays = [row_decay**distance for distance in range(longest)]
    for window in sample.windows:
        rows = window.rows(text)
        if rows:
            packed.segments.append((window.start, window.inputs(text)))
            packed.nominal += 1 + len(window.guesses)
            packed.positions += range(window.start + rows.start, window.start + rows.stop)
            packed.students += [len(packed.segments)] * len(rows)
            packed.teachers += [0] * len(rows)
            packed.weights += decays[: len(rows)]
    for entry, state in sample.picks:
        start, length = prompt + example.block_start(entry), len(example.blocks[entry].fixed_point)
        packed.nominal += length
        segment, wrong, count = segment_of(entry, state)
        next_segment, next_wrong, _ = segment_of(entry, state + 1) if local else (0, len(text), 0)
        positions = range(start + wrong, start + wrong + count)
        packed.positions += positions
        packed.students += [segment] * count
        packed.teachers += [0 if at < start + next_wrong else next_segment for at in positions]
        packed.weights += [1.0] * count
    taught: set[int] = set()
    for position, teacher in zip(packed.positions, packed.teachers, strict=True):
        first_taught = teacher == 0 and position not in taught
        packed.taught.append(text[position + 1] if first_taught else IGNORED)
        if first_taught:
            taught.add(position)
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
