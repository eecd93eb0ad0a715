"""Figures of a collection, added up shard by shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..examples import TrainingExample


@dataclass(frozen=True)
class CollectionStatistics:
    """Sums over responses.

    Attributes:
        responses, blocks: how many.
        states: of all blocks together, the fixed points included.
        noisy_tokens: of all states but the fixed points.
    """

    responses: int = 0
    blocks: int = 0
    states: int = 0
    noisy_tokens: int = 0

    @classmethod
    def of(cls, examples: Iterable[TrainingExample]) -> CollectionStatistics:
        """Of some responses."""
        return cls.merged(
            cls(
                1,
                len(example.blocks),
                sum(len(block.states) for block in example.blocks),
                sum((len(b.states) - 1) * len(b.fixed_point) for b in example.blocks),
            )
            for example in examples
        )

    @classmethod
    def merged(cls, parts: Iterable[CollectionStatistics]) -> CollectionStatistics:
        """Of several collections together."""
        found = list(parts)
        names = ("responses", "blocks", "states", "noisy_tokens")
        return cls(*(sum(getattr(part, name) for part in found) for name in names))

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CollectionStatistics:
        """The inverse of `to_json`."""
        return cls(**record)
