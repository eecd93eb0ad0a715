"""What a user can set about consistency training, validated where it is written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Consistency = Literal["global", "local"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Teacher = Literal["self", "base", "ema"]
Sampling = Literal["uniform", "per_block", "schedule", "sliding", "visited"]


@dataclass(frozen=True)
class ConsistencyConfig:
    """Settings of consistency training (CLLM, arXiv 2403.00835, section 3.2).

    With y a state on the trajectory of a block, y* its fixed point, q the student and p the teacher
    (no gradient flows into it), per counted row i:

        global  L_GC = D(p(. | y*_<i), q(. | y_<i))           (eq. 6)
        local   L_LC = D(p(. | y'_<i), q(. | y_<i)), y' the state after y    (eq. 7)
        loss    = mean over rows + ar_weight * mean cross-entropy of the response's own tokens

    Rows count from the state's first wrong token on: before it, student and teacher see the same.

    Attributes:
        consistency: ``"global"`` or ``"local"``.
        divergence: D: ``"forward_kl"`` KL(p || q), ``"reverse_kl"`` KL(q || p), or ``"jsd"``.
        beta: the teacher's share of the mixture; ``"jsd"`` only.
        temperature: of both distributions in D.
        ar_weight: weight of the autoregressive loss (the paper's 10).
        label_smoothing: of the autoregressive loss (the paper's code: 0.1).
        teacher: ``"self"``, the model itself (the paper's stop-gradient); ``"base"``, the model as
            it was before training (with LoRA: the adapter switched off, no second copy);
            ``"ema"``, an exponential moving average of the weights.
        ema_decay: of the ``"ema"`` teacher, per optimiser step.
        sampling: which noisy states of a response are trained on: ``"uniform"``: `states` of all
            its states, drawn alike; ``"per_block"``: `states` of every block;
            ``"schedule"``: `states` of every block, the share of wrong tokens rising linearly over
            windows of `schedule_window` blocks (arXiv 2512.14681); ``"sliding"``: `states` of every
            block, each going on into a state of the next block until it is as long as a window
            (`SampledExample.tails`): what decoding's sliding window holds;
            ``"visited"`` (gated only): `states` windows a response that walk along it as decoding
            does, from one step that sees the response to the next, on the adapter's own guesses
            (`VisitedWindows`); the states of the trajectories are not used.
        states: states a response (``"uniform"``, ``"visited"``) or a block (the others).
        window_size: tokens of a window, ``"visited"`` only: the block size to decode with later.
            None: that of the trajectories. A list: the windows of a response take its sizes in
            turn; most guesses that decoding accepts stand close behind the committed text, so
            small windows train more of those for the same work, and large ones the others.
        row_decay: a window's counted rows weigh ``row_decay ** distance`` in the loss, by their
            distance from the first: a guess is of use only where those before it are right. For
            ``"visited"``.
        schedule_window: blocks over which the share of wrong tokens goes from low to high.
        chunk_tokens: rows whose logits exist at a time; None: chosen from the free memory.
        recompute: save memory by computing logits twice (`cllm_kernels.linear_consistency_loss`).
        gated: train LoRA adapters that work in the noisy columns alone. All other columns are the
            frozen base model, which is the teacher (``"self"`` and ``"base"`` are the same here),
            so the autoregressive loss is reported but moves nothing, whatever `ar_weight`. The
            adapter is for gated decoding (``cllm.generate(..., adapter=...)``), which gives the
            base model's own text. Noisy segments start one token earlier, at the last right
            token, as decoding's windows do; that row is an input and is not counted.
        clean_cache_gib: GiB of memory (of the model's device) for what the base model makes of
            clean texts, so that later epochs need not read them again; gated training only. A
            token takes its KV and one hidden state.

    Raises:
        ValueError: naming every field that has a bad value.
    """

    consistency: Consistency = "global"
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    ar_weight: float = 10.0
    label_smoothing: float = 0.1
    teacher: Teacher = "self"
    ema_decay: float = 0.999
    sampling: Sampling = "per_block"
    states: int = 1
    window_size: int | Sequence[int] | None = None
    row_decay: float = 1.0
    schedule_window: int = 4
    chunk_tokens: int | None = None
    recompute: bool = False
    gated: bool = False
    clean_cache_gib: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        for name, choices in (
            ("consistency", Consistency),
            ("divergence", Divergence),
            ("teacher", Teacher),
            ("sampling", Sampling),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(repr(choice) for choice in get_args(choices))
                problems.append(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name, good, text in (
            ("beta", lambda x: 0 < x < 1, "lie between 0 and 1"),
            ("temperature", lambda x: x > 0, "be positive"),
            ("ar_weight", lambda x: x >= 0, "be 0 or more"),
            ("label_smoothing", lambda x: 0 <= x < 1, "lie in [0, 1)"),
            ("row_decay", lambda x: 0 < x <= 1, "lie in (0, 1]"),
            ("ema_decay", lambda x: 0 <= x < 1, "lie in [0, 1)"),
            ("clean_cache_gib", lambda x: x >= 0, "be 0 or more"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and good(value)):
                problems.append(f"{name} must {text}, not {value!r}")
        for name, least in (
            ("states", 1), ("schedule_window", 1), ("chunk_tokens", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value is None and name == "chunk_tokens") and not _is_count(value, least):
                problems.append(f"{name} must be an integer >= {least}, not {value!r}")
        size: Any = self.window_size
        several = isinstance(size, list | tuple) and size and all(_is_count(n, 2) for n in size)
        if not (size is None or _is_count(size, 2) or several):
            problems.append(
                f"window_size must be an integer >= 2 or a list of such integers, not {size!r}"
            )
        for name in ("recompute", "gated"):
            switch: Any = getattr(self, name)
            if not isinstance(switch, bool):
                problems.append(f"{name} must be True or False, not {switch!r}")
        if self.sampling == "sliding" and self.consistency == "local":
            problems.append(
                "sampling='sliding' needs consistency='global': its states have no next one"
            )
        if self.sampling == "visited" and self.gated is not True:
            problems.append("sampling='visited' follows an adapter's guesses; it needs gated=True")
        if self.sampling != "visited":
            if self.window_size is not None:
                problems.append("window_size is of sampling='visited'; leave it out")
            if self.row_decay != 1.0:
                problems.append("row_decay is of sampling='visited'; leave it out")
        if self.gated is not True and self.clean_cache_gib:
            problems.append(
                "clean_cache_gib keeps what a frozen base model gives; it needs gated=True"
            )
        if self.gated is True:
            if self.teacher == "ema":
                problems.append(
                    "gated training is taught by the frozen base model in its clean columns; "
                    "teacher must be 'self' or 'base', not 'ema'"
                )
            if self.consistency == "local":
                problems.append(
                    "gated training is towards the base model's own text; consistency must be "
                    "'global', not 'local'"
                )
        if problems:
            raise ValueError("ConsistencyConfig: " + "; ".join(problems))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
