"""What a user can set about Jacobi decoding, validated where it is written down."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from cllm_kernels._native import bf16_dot, isa
from cllm_kernels.guess_candidates import MOST as MOST_CANDIDATES

from ..fill import Fill

Mode = Literal["sliding", "block"]
Accept = Literal["all", "one"]
Guesses = Literal["adaptive", "ordered"]
Compile = Literal["graph", "inductor", "off"]
BlockSize = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class JacobiConfig:
    """Settings of Jacobi decoding (CLLM, arXiv 2403.00835, section 3).

    None of them changes the text, but `seed` where it is sampled; they change how many forward
    passes it takes, and in bf16/fp16 `block_size` (with an adapter: `verify_size` + `block_size`;
    with several `candidates`: that many times as much) also fixes the forward's width and with
    it the rounding of near-ties. In models without native layers, and in forwards of more than 64
    rows on a CPU, such a near-tie can also hang on which candidate was right.

    Attributes:
        block_size: ``n``, the tokens in a window, and the rows of a forward over one. ``None``: 16
            on a GPU; on a CPU, where rows cost time, 6 in the types that its instructions make
            quick (float32 with AVX2, bfloat16 where it is multiplied as it is), else 4. In batches
            fewer, so that a forward has few rows (`on`), and an adapter is not asked where no
            window of two would be left (`asks_adapter`).
            ``"auto"``: what should decode fastest, by the time of a forward (measured in the first
            call of a model, device and batch size) and by how often guesses have been right in the
            calls so far; 1 where nothing else pays. With an adapter it is also chosen whether to
            use it. In sliding mode only. In bf16 and fp16 near-ties fall by the width that
            ``None`` or ``"auto"`` comes to.
        mode: ``"sliding"`` moves the window past every token that is final; ``"block"`` is the
            paper's: iterate one n-token block to its fixed point, then start the next.
        fill: where a guess comes from when no earlier prediction is left for its position:
            ``"prompt"`` draws from the row's own prompt (the paper's choice), ``"last"`` repeats
            the last prediction, ``"random"`` draws from the vocabulary, ``"pad"`` is the pad token.
        lookup: most tokens of the text's end that are looked up in the text before them; what
            followed there is a guess for the window (prompt lookup decoding). 0: nothing is
            looked up. In sliding mode only. ``None``: 8 in sliding mode, 0 in block mode.
        lookup_least: an end that is found again must have so many tokens, from 1 to `lookup`.
            ``None``: 2 where the pool or an adapter would guess otherwise, else 1.
        pool: another guess behind each token is what the model predicted behind it last, in wrong
            windows too, or what stood behind it in the prompt. In sliding mode only. ``None``:
            where something is looked up, and no adapter makes the guesses or another candidate has
            them.
        guesses: which of text, pool and the window's own predictions (with an adapter: its
            guesses) a window takes. ``"adaptive"``: row by row the one that has been right most
            often in the text so far, taken or not (with ``block_size="auto"`` in the calls before,
            too). ``"ordered"``: the text where it says something, else the pool, else the window's
            own, as in the candidate beside an adapter's. In sliding mode only.
        candidates: ``C``, up to 32, windows for the same places that one forward of C * n rows
            checks, each by itself; the one with the most right guesses counts. Where there are
            enough, they begin with different guesses: other continuations of the text's end, the
            pool's, the predictions that were left over. With an adapter its guesses are one of the
            first two, and every candidate is followed by guess rows: a forward has 2 * C * n. For
            devices on which rows cost little; in sliding mode only.
        seed: of the random fills, and with ``do_sample=True`` of the samples: the same seed gives
            the same text. ``None``: fills take 0, a call that samples draws a seed from its
            ``generator`` or from torch's own.
        max_iterations: most forward passes of one call (prefill apart); what is final by then is
            returned. ``None``: as many as the text takes.
        accept: ``"all"`` keeps every final token. ``"one"`` keeps one per forward: one-token
            decoding through forwards of the same width, to compare with in bf16 and fp16.
        record_trajectories: keep every iteration's window and predictions (`cllm.Trajectory`).
        verify_size: ``v``, how many of the window's tokens the base model checks in a forward whose
            guesses an adapter makes (`cllm.GatedAdapter`): such a forward has v + n rows, and
            commits v tokens at most. Fewer than ``n`` in sliding mode only. ``None``: ``n``.
            Without an adapter there is nothing to set.
        compile: ``"graph"`` captures whole iterations in a CUDA graph and replays it, see
            `cllm.decoding.graphs`; with logits processors, samples or recorded trajectories the
            forward over a window alone. A model keeps its captures, and the caches they write to,
            for further calls (`cllm.decoding.graphs.kept_bytes`, ``forget``). ``"inductor"``, on a
            CPU: `torch.compile` makes one of the forward over a window, see
            `cllm.decoding.inductor`, which takes some tens of seconds for every shape; not with an
            adapter. ``"off"``: everything is launched kernel by kernel. ``None``: on a GPU, a graph
            from the second call of a shape on, where nobody watches the model (hooks, recorded
            trajectories), neither autocast nor several devices stand against it and its layout is
            native layers or block attention, as long as all caches that are kept are small beside
            the device's memory; else, and on a CPU, ``"off"``. A shape whose capture ran out of
            memory goes without a graph until ``forget(model)``; who asks for one is told of that
            once. In bf16 and fp16 near-ties may fall by the size of the cache, which is a graph's
            in all calls of a shape that comes to have one, and by what inductor fuses.

    Raises:
        ValueError: naming every field that has a bad value.
    """

    block_size: BlockSize | None = None
    mode: Mode = "sliding"
    fill: Fill = "prompt"
    seed: int | None = None
    max_iterations: int | None = None
    accept: Accept = "all"
    record_trajectories: bool = False
    verify_size: int | None = None
    lookup: int | None = None
    lookup_least: int | None = None
    pool: bool | None = None
    guesses: Guesses = "adaptive"
    candidates: int = 1
    compile: Compile | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.block_size == AUTO:
            problems.extend(self._auto_problems())
        elif self.block_size is not None and not _is_positive(self.block_size):
            problems.append(
                f"block_size must be None, an integer >= 1 or 'auto', not {self.block_size!r}"
            )
        elif self.verify_size is not None:
            problems.extend(_verify_problems(self.verify_size, self.block_size, self.mode))
        problems.extend(self._lookup_problems())
        for name, choices in (
            ("mode", Mode),
            ("fill", Fill),
            ("accept", Accept),
            ("guesses", Guesses),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(repr(choice) for choice in get_args(choices))
                problems.append(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            problems.append(f"seed must be None or an integer in [0, 2**63), not {self.seed!r}")
        if self.max_iterations is not None and (
            not _is_int(self.max_iterations) or self.max_iterations < 1
        ):
            problems.append(
                f"max_iterations must be None or an integer >= 1, not {self.max_iterations!r}"
            )
        pool: Any = self.pool
        if pool is not None and not isinstance(pool, bool):
            problems.append(f"pool must be None, True or False, not {pool!r}")
        elif pool and self.mode == "block":
            problems.append("pool=True needs mode='sliding': a block keeps its own guesses")
        if self.guesses == "ordered" and self.mode == "block":
            problems.append("guesses='ordered' needs mode='sliding': a block keeps its own guesses")
        if not _is_positive(self.candidates) or self.candidates > MOST_CANDIDATES:
            problems.append(
                f"candidates must be an integer from 1 to {MOST_CANDIDATES}, "
                f"not {self.candidates!r}"
            )
        elif self.candidates > 1 and self.mode == "block":
            problems.append(
                f"candidates={self.candidates} needs mode='sliding': a block keeps its own guesses"
            )
        elif self.candidates > 1 and self.verify_size is not None:
            problems.append(
                f"candidates={self.candidates} are all checked whole; leave verify_size None"
            )
        if self.compile is not None and self.compile not in get_args(Compile):
            problems.append(
                "compile must be None (on a GPU, a CUDA graph from the second call of a shape on), "
                f"'graph', 'inductor' or 'off', not {self.compile!r}"
            )
        record: Any = self.record_trajectories
        if not isinstance(record, bool):
            problems.append(f"record_trajectories must be True or False, not {record!r}")
        if problems:
            raise ValueError("JacobiConfig: " + "; ".join(problems))

    @property
    def longest_lookup(self) -> int:
        """`lookup`, with what ``None`` stands for."""
        if self.lookup is None:
            return max(_LOOKUP, self.lookup_least or 1) if self.mode == "sliding" else 0
        return self.lookup

    def pools(self, gated: bool) -> bool:
        """`pool`, with what ``None`` stands for, where an adapter guesses or does not."""
        if self.pool is not None:
            return self.pool
        return bool(self.longest_lookup) and (not gated or self.candidates > 1)

    def least_lookup(self, gated: bool) -> int:
        """`lookup_least`, with what ``None`` stands for."""
        if self.lookup_least is not None:
            return self.lookup_least
        return min(self.longest_lookup, 2 if gated or self.pools(gated) else 1)

    def weighs(self, gated: bool) -> bool:
        """Whether sources are chosen by how often they were right, where there are several; the
        known text beside an adapter's candidates is not."""
        return self.guesses == "adaptive" and not (gated and self.candidates > 1)

    @property
    def width(self) -> int:
        """`block_size` of settings that name one."""
        if self.block_size is None or isinstance(self.block_size, str):
            raise ValueError(
                f"block_size={self.block_size!r} is no number before a call has chosen one"
            )
        return self.block_size

    def on(
        self,
        device: str,
        batch: int,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        context: int | None = None,
    ) -> JacobiConfig:
        """These settings with the block size that ``None`` stands for.

        Args:
            device: its type.
            batch: rows.
            gated: an adapter guesses.
            dtype: of the model; None: not known.
            context: most positions of the model, which no window exceeds; None: there is no such
                number.
        """
        if self.block_size is not None:
            return self
        size = _WINDOW
        if device == "cpu":
            alone = not gated and self.candidates == 1 and self.mode == "sliding"
            size = _CPU_WINDOW_QUICK if alone and _quick(dtype) else _CPU_WINDOW
        if self.mode == "sliding" and not self.record_trajectories:
            size = min(size, max(1, _most_rows(device) // (batch * (2 if gated else 1))))
            if self.candidates > 1 or gated:  # somebody wants more rows than these
                size = max(size, 2)
        if self.verify_size is not None:  # all of a block is checked
            size = self.verify_size if self.mode == "block" else max(size, self.verify_size)
        if context is not None:
            size = max(min(size, context), self.verify_size or 1)
        return replace(self, block_size=size)

    def asks_adapter(self, device: str, batch: int) -> bool:
        """Whether an adapter makes the guesses where there is one. The text is the base's anyway.

        False where nobody has said how many rows a forward may have, and a batch is so large that
        two tokens of each row and their guesses would be more of them than pay.
        """
        said = self.block_size is not None or self.verify_size is not None or self.candidates > 1
        if said or self.mode == "block" or self.record_trajectories:
            return True
        return _most_rows(device) // (2 * batch) >= 2

    def _auto_problems(self) -> list[str]:
        problems = []
        if self.mode != "sliding":
            problems.append("block_size='auto' needs mode='sliding'")
        if self.accept != "all":
            problems.append("block_size='auto' needs accept='all': one token a forward has no best")
        if self.candidates != 1:
            problems.append("block_size='auto' times forwards over one window; leave candidates 1")
        if self.verify_size is not None:
            problems.append("block_size='auto' chooses verify_size, too; leave it None")
        if self.compile == "inductor":
            problems.append(
                "block_size='auto' times windows of many sizes, and inductor takes long to compile "
                "each; give a number"
            )
        return problems

    def _lookup_problems(self) -> list[str]:
        longest, least = self.lookup, self.lookup_least
        if longest is not None and (not _is_int(longest) or longest < 0):
            return [f"lookup must be None or an integer >= 0, not {longest!r}"]
        if longest and self.mode == "block":
            return [f"lookup={longest} needs mode='sliding': a block keeps its own guesses"]
        if least is not None and (
            not _is_int(least) or least < 1 or (longest is not None and least > longest)
        ):
            most = "lookup" if longest is None else f"lookup={longest}"
            return [f"lookup_least must be None or an integer from 1 to {most}, not {least!r}"]
        return []

    def updated(self, **changes: Any) -> JacobiConfig:
        """A copy with every field of `changes` that is not None replaced, validated again."""
        return replace(
            self, **{name: value for name, value in changes.items() if value is not None}
        )


_LOOKUP = 8
# By what was measured (docs/performance.md). On a CPU four rows cost about what one does, six where
# its instructions are quick, and in batches of 4 and 16 more than eight do not pay; on a GPU a
# large model's forward takes little longer for sixteen rows than for one, for 64 a third longer.
_CPU_WINDOW = 4
_CPU_WINDOW_QUICK = 6
_CPU_ROWS = 8
_WINDOW = 16
_ROWS = 64
FIELDS = tuple(field.name for field in fields(JacobiConfig))


def _quick(dtype: torch.dtype | None) -> bool:
    """Whether this CPU hides the arithmetic of six rows behind the reading of the weights."""
    if dtype is torch.float32:
        return isa() in ("avx2", "avx512")
    return dtype is torch.bfloat16 and bf16_dot()


def _most_rows(device: str) -> int:
    return _CPU_ROWS if device == "cpu" else _ROWS


def _verify_problems(verify_size: object, block_size: int | None, mode: str) -> list[str]:
    if block_size is None:
        right = _is_positive(verify_size)
        problem = f"verify_size must be None or an integer >= 1, not {verify_size!r}"
        return [] if right else [problem]
    if not _is_positive(verify_size) or verify_size > block_size:  # type: ignore[operator]
        return [
            f"verify_size must be None or an integer from 1 to block_size={block_size}, not "
            f"{verify_size!r}"
        ]
    if mode == "block" and verify_size != block_size:
        return [
            f"verify_size={verify_size} must equal block_size={block_size} in block mode, which "
            "checks whole blocks; leave it None"
        ]
    return []


def _is_positive(value: object) -> bool:
    return _is_int(value) and value >= 1  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
