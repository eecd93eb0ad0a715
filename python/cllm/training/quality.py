"""The quality bound: which checkpoints count, which of them is the best, and when to stop.

A self-taught model can lower its loss by writing text that is easy to predict; it is then fast and
worthless. So speed counts only while the text stays as likely under the base model, and as little
repetitive, as the base model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class QualityBound:
    """What an evaluation must keep to count.

    Attributes:
        max_nll_increase: nats per token that the negative log-likelihood of the text under the base
            model may lie above that of the base's own text.
        repetition_slack: how far the repetition rate may lie above the base's.
    """

    max_nll_increase: float = 0.05
    repetition_slack: float = 0.01

    def violations(self, metrics: Mapping[str, float]) -> list[str]:
        """What lies outside the bound, in words; empty inside.

        Args:
            metrics: of `cllm.evaluation.Evaluation.metrics`: "nll_under_base", "base_nll",
                "repetition" and "base_repetition".

        Raises:
            KeyError: if one of them is missing.
        """
        found = []
        for name, base, slack, text in (
            ("nll_under_base", "base_nll", self.max_nll_increase, "NLL under the base"),
            ("repetition", "base_repetition", self.repetition_slack, "repetition"),
        ):
            value, limit = metrics[name], metrics[base] + slack
            # written so that a NaN lies outside
            if not value <= limit + 1e-9:
                found.append(f"{text} {value:.3f} > {limit:.3f}")
        return found


@dataclass(frozen=True)
class Verdict:
    """What one evaluation means.

    Attributes:
        violations: what lies outside the bound; empty inside.
        best: whether this is the best checkpoint so far.
        stop: whether training should end here.
    """

    violations: list[str]
    best: bool
    stop: bool

    @property
    def inside(self) -> bool:
        return not self.violations


@dataclass
class QualityWatch:
    """Follows the evaluations of a run; its state goes into every checkpoint.

    Attributes:
        bound: the bound.
        patience: evaluations in a row outside the bound after which to stop; None: never stop.
        best_step: optimiser step of the best evaluation inside the bound; None: none was inside.
        best_tokens_per_forward: of that evaluation.
        outside: evaluations outside the bound since the last one inside.
    """

    bound: QualityBound
    patience: int | None = 2
    best_step: int | None = None
    best_tokens_per_forward: float = -math.inf
    outside: int = 0

    def judge(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Take in the evaluation at optimiser step `step`."""
        violations = self.bound.violations(metrics)
        self.outside = self.outside + 1 if violations else 0
        speed = metrics["tokens_per_forward"]
        best = not violations and speed > self.best_tokens_per_forward
        if best:
            self.best_step, self.best_tokens_per_forward = step, speed
        stop = self.patience is not None and self.outside >= self.patience
        return Verdict(violations, best, stop)

    def state(self) -> dict[str, Any]:
        """JSON-serialisable; `restore` takes it back."""
        state = asdict(self)
        del state["bound"], state["patience"]
        if self.best_step is None:
            del state["best_tokens_per_forward"]
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` gave."""
        self.best_step = state["best_step"]
        self.best_tokens_per_forward = state.get("best_tokens_per_forward", -math.inf)
        self.outside = state["outside"]
