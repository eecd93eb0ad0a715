"""What collected trajectories amount to: counts that add up over rows, shards and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ..examples import BlockStates, TrainingExample


@dataclass
class CollectionStatistics:
    """Sums over responses; ``+`` merges those of two shards.

    All counts are of the blocks that were collected, which may be a share of each response's.

    Attributes:
        responses: rows.
        prompt_tokens, response_tokens: in them, whether their blocks were collected or not.
        blocks, block_tokens: trajectories, and the tokens of their fixed points.
        states, state_tokens: states of all trajectories, the fixed points included, and their
            tokens: the paper's N, trajectories x states x block size.
        iterations: forward passes that decoding in block mode would take (`BlockStates`).
        fast_forwarded: tokens that a pass confirmed beyond the first (`fast_forwarded`).
        stationary: tokens that stood right behind a wrong one, and stayed (`stationary`).
        mismatches: response tokens that are not the model's likeliest.
    """

    responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    blocks: int = 0
    block_tokens: int = 0
    states: int = 0
    state_tokens: int = 0
    iterations: int = 0
    fast_forwarded: int = 0
    stationary: int = 0
    mismatches: int = 0

    @classmethod
    def of(cls, examples: Iterable[TrainingExample]) -> CollectionStatistics:
        """The statistics of these responses (`mismatches` is known to the collector only)."""
        total = cls()
        for example in examples:
            total.responses += 1
            total.prompt_tokens += len(example.prompt)
            total.response_tokens += len(example.response)
            for block in example.blocks:
                total.blocks += 1
                total.block_tokens += len(block.fixed_point)
                total.states += len(block.states)
                total.state_tokens += sum(map(len, block.states))
                total.iterations += block.iterations
                total.fast_forwarded += sum(fast_forwarded(block))
                total.stationary += sum(stationary(block))
        return total

    @classmethod
    def merged(cls, parts: Iterable[CollectionStatistics]) -> CollectionStatistics:
        """The sum of any number of parts."""
        return sum(parts, start=cls())

    def __add__(self, other: CollectionStatistics) -> CollectionStatistics:
        return CollectionStatistics(
            *(getattr(self, name) + getattr(other, name) for name in _COUNTS)
        )

    @property
    def iterations_per_block(self) -> float:
        """The average length of a trajectory, in forward passes."""
        return _ratio(self.iterations, self.blocks)

    @property
    def states_per_block(self) -> float:
        return _ratio(self.states, self.blocks)

    @property
    def tokens_per_forward(self) -> float:
        """What decoding in block mode would gain per forward pass."""
        return _ratio(self.block_tokens, self.iterations)

    @property
    def fast_forwarded_per_forward(self) -> float:
        return _ratio(self.fast_forwarded, self.iterations)

    @property
    def stationary_per_forward(self) -> float:
        return _ratio(self.stationary, self.iterations)

    def to_json(self) -> dict[str, Any]:
        """The counts, and the averages for whoever reads the file."""
        return {name: getattr(self, name) for name in (*_COUNTS, *_AVERAGES)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CollectionStatistics:
        """The inverse of `to_json`; averages follow from the counts. Missing counts are 0."""
        return cls(**{name: int(record.get(name, 0)) for name in _COUNTS})

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of a table."""
        return [
            ("responses", f"{self.responses:,}"),
            ("prompt tokens", f"{self.prompt_tokens:,}"),
            ("response tokens", f"{self.response_tokens:,}"),
            ("trajectories (blocks)", f"{self.blocks:,}"),
            ("states", f"{self.states:,}"),
            ("tokens in all states (N)", f"{self.state_tokens:,}"),
            ("iterations per block", f"{self.iterations_per_block:.2f}"),
            ("tokens per forward in block mode", f"{self.tokens_per_forward:.3f}"),
            ("fast-forwarded tokens per forward", f"{self.fast_forwarded_per_forward:.3f}"),
            ("stationary tokens per forward", f"{self.stationary_per_forward:.3f}"),
            ("response tokens not the model's own", f"{self.mismatches:,}"),
        ]


_COUNTS = tuple(entry.name for entry in fields(CollectionStatistics))
_AVERAGES = (
    "iterations_per_block",
    "states_per_block",
    "tokens_per_forward",
    "fast_forwarded_per_forward",
    "stationary_per_forward",
)


def fast_forwarded(block: BlockStates) -> list[int]:
    """Per forward pass, the tokens it confirms beyond the first: what one-token decoding would have
    paid further passes for (CLLM, arXiv 2403.00835, section 4.3). As
    `cllm.Trajectory.fast_forwarded` of decoding in block mode."""
    return [max(count - 1, 0) for count in confirmed(block)]


def confirmed(block: BlockStates) -> list[int]:
    """Per forward pass, the tokens that become known to be final. They add up to the block.

    A pass over a state right up to index d confirms the tokens up to d, itself included."""
    ends = [
        min(first + 1, len(block.fixed_point))
        for first in block.first_divergence[: block.iterations]
    ]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def stationary(block: BlockStates) -> list[int]:
    """Per forward pass, the drafted tokens that were right behind a wrong one, and that every later
    pass kept (CLLM, section 4.3). As `cllm.Trajectory.stationary` of decoding in block mode."""
    fixed, passes = block.fixed_point, block.iterations
    # what pass j drafted is state j + 1; behind the last state stands the fixed point
    drafted = [block.states[min(j + 1, len(block.states) - 1)] for j in range(passes)]
    lasting = [passes] * len(fixed)
    for index, token in enumerate(fixed):
        while lasting[index] > 0 and drafted[lasting[index] - 1][index] == token:
            lasting[index] -= 1
    counts = []
    for number, state in enumerate(drafted):
        first = next((i for i, (a, b) in enumerate(zip(state, fixed, strict=True)) if a != b), None)
        behind = range(len(fixed)) if first is None else range(first + 1, len(fixed))
        counts.append(0 if first is None else sum(lasting[i] <= number for i in behind))
    return counts


def _ratio(count: int, of: int) -> float:
    return count / of if of else 0.0
