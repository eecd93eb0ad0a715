"""Stop conditions, sorted by where they can be decided: on the device, or token by token here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)


@dataclass
class StopRules:
    """The stopping criteria of one call, taken apart.

    Attributes:
        stop_ids: token ids that end a row, decided by `jacobi_step` on the device.
        max_length: most tokens of a row, the (padded) prompt included; on the device as well.
        per_iteration: criteria of time, which do not depend on the tokens.
        per_token: stop strings and custom criteria; they see every prefix that one-token decoding
            would show them, row by row.
    """

    stop_ids: list[int] = field(default_factory=list)
    max_length: int | None = None
    per_iteration: list[Any] = field(default_factory=list)
    per_token: list[Any] = field(default_factory=list)

    @classmethod
    def from_criteria(cls, criteria: StoppingCriteriaList) -> StopRules:
        rules = cls()
        for criterion in criteria:
            # exact types: a subclass may decide differently
            if type(criterion) is MaxLengthCriteria:
                known = rules.max_length
                rules.max_length = min(
                    criterion.max_length, criterion.max_length if known is None else known
                )
            elif type(criterion) is EosTokenCriteria:
                rules.stop_ids.extend(int(token) for token in criterion.eos_token_id.flatten())
            elif type(criterion) is MaxTimeCriteria:
                rules.per_iteration.append(criterion)
            else:
                rules.per_token.append(criterion)
        return rules

    def out_of_time(self, sequences: torch.Tensor) -> bool:
        return any(
            bool(torch.as_tensor(criterion(sequences, None)).all())
            for criterion in self.per_iteration
        )

    def first_stop(self, sequence: torch.Tensor, start: int, end: int) -> int | None:
        """How many of the tokens ``sequence[start:end]`` to keep, if a criterion stops the row.

        Args:
            sequence: [length] a row's tokens with its (padded) prompt.

        Returns:
            The count up to and including the first token that stops, or None.
        """
        if not self.per_token:
            return None
        for length in range(start + 1, end + 1):
            prefix = sequence[None, :length]
            if any(
                bool(torch.as_tensor(criterion(prefix, None)).all()) for criterion in self.per_token
            ):
                return length - start
        return None
