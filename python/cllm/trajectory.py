"""The record of one Jacobi decoding run: what every forward pass guessed, and what became final.

Decoding writes it, the report draws it and training learns from it, so it lives beside all three.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .files import write_atomically


class TrajectoryError(ValueError):
    """A trajectory file that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Iteration:
    """One forward pass over a window of ``n`` tokens.

    Attributes:
        position: index in the generated text of ``predictions[0]``.
        window: the ``n`` tokens fed to the model. ``window[0]`` is final and stands right before
            ``position``; ``window[1:]`` are the guesses for ``position``, ``position + 1``, ...
        predictions: the ``n`` tokens that came out, the draft for the generated text from
            ``position`` on.
        exact: how many leading predictions are now final (at least 1), counted from ``position``.
        accepted: how many tokens this pass committed. Smaller than ``exact`` where a stop token or
            a length limit cut the run, or where earlier passes over the same block had committed
            its first tokens already.
    """

    position: int
    window: list[int]
    predictions: list[int]
    exact: int
    accepted: int


@dataclass
class Trajectory:
    """All forward passes that decoded one prompt.

    Attributes:
        prompt: the prompt's token ids, without padding.
        tokens: the generated token ids.
        iterations: one entry a forward pass, in order (the prefill is not among them).
        block_size: ``n``, the window's width.
        mode: ``"sliding"`` or ``"block"``.
        pieces: token id to text, for reports that have no tokenizer (`with_pieces`).
        prompt_text: the prompt as text, where known.
        title: how it was decoded, where a report is to tell it from others of the same prompt.
    """

    prompt: list[int]
    tokens: list[int]
    iterations: list[Iteration]
    block_size: int
    mode: str
    pieces: dict[int, str] | None = None
    prompt_text: str | None = None
    title: str | None = None
    _right_from: list[int] | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens committed per forward pass, every pass counted except the prefill."""
        return len(self.tokens) / len(self.iterations) if self.iterations else 0.0

    @property
    def fast_forwarded(self) -> list[int]:
        """Per iteration, the tokens committed beyond the first: what one-token decoding would have
        paid further forward passes for (CLLM, arXiv 2403.00835, section 4.3)."""
        return [max(iteration.accepted - 1, 0) for iteration in self.iterations]

    @property
    def stationary(self) -> list[int]:
        """Per iteration, the drafted tokens that were already right although a token before them
        was still wrong, and that every later pass kept (CLLM, section 4.3)."""
        right_from = self._first_lasting_pass()
        counts = []
        for index, iteration in enumerate(self.iterations):
            end = min(iteration.position + len(iteration.predictions), len(self.tokens))
            counts.append(
                sum(
                    right_from[position] <= index
                    for position in range(iteration.position + iteration.exact, end)
                    if self._wrong_before(iteration, position)
                )
            )
        return counts

    def _wrong_before(self, iteration: Iteration, position: int) -> bool:
        drafted = iteration.predictions[: position - iteration.position]
        return drafted != self.tokens[iteration.position : position]

    def _first_lasting_pass(self) -> list[int]:
        """For each generated token, the first pass from which every later draft had it right."""
        if self._right_from is not None:
            return self._right_from
        right_from = [len(self.iterations)] * len(self.tokens)
        broken = [False] * len(self.tokens)
        for index in reversed(range(len(self.iterations))):
            iteration = self.iterations[index]
            for offset, token in enumerate(iteration.predictions):
                position = iteration.position + offset
                if position >= len(self.tokens) or broken[position]:
                    continue
                if token == self.tokens[position]:
                    right_from[position] = index
                else:
                    broken[position] = True
        self._right_from = right_from
        return right_from

    def with_pieces(self, tokenizer: Any) -> Trajectory:
        """Fill `pieces` and `prompt_text` from a HuggingFace tokenizer; returns self."""
        ids = set(self.tokens)
        for iteration in self.iterations:
            ids.update(iteration.window)
            ids.update(iteration.predictions)
        self.pieces = {token: _piece(tokenizer, token) for token in sorted(ids)}
        self.prompt_text = tokenizer.decode(self.prompt, clean_up_tokenization_spaces=False)
        return self

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; `from_json` reads it back."""
        return {
            "prompt": self.prompt,
            "tokens": self.tokens,
            "block_size": self.block_size,
            "mode": self.mode,
            "prompt_text": self.prompt_text,
            **({} if self.title is None else {"title": self.title}),
            "pieces": None
            if self.pieces is None
            else {str(token): text for token, text in self.pieces.items()},
            "iterations": [asdict(iteration) for iteration in self.iterations],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trajectory:
        """The inverse of `to_json`.

        Raises:
            TrajectoryError: if a field is missing or has the wrong form.
        """
        try:
            pieces = record.get("pieces")
            trajectory = cls(
                prompt=[int(token) for token in record["prompt"]],
                tokens=[int(token) for token in record["tokens"]],
                block_size=int(record["block_size"]),
                mode=str(record["mode"]),
                prompt_text=record.get("prompt_text"),
                title=None if record.get("title") is None else str(record["title"]),
                pieces=None if pieces is None else {int(k): str(v) for k, v in pieces.items()},
                iterations=[
                    Iteration(
                        position=int(entry["position"]),
                        window=[int(token) for token in entry["window"]],
                        predictions=[int(token) for token in entry["predictions"]],
                        exact=int(entry["exact"]),
                        accepted=int(entry["accepted"]),
                    )
                    for entry in record["iterations"]
                ],
            )
        except KeyError as error:
            raise TrajectoryError(f"the field {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise TrajectoryError(f"a field has the wrong form: {error}") from error
        accepted = sum(iteration.accepted for iteration in trajectory.iterations)
        if accepted != len(trajectory.tokens):
            raise TrajectoryError(
                f"its iterations commit {accepted} tokens, but it has {len(trajectory.tokens)}"
            )
        return trajectory


def _piece(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    raw = tokenizer.convert_ids_to_tokens(token)
    # SentencePiece decoders drop the space that a text's first word starts with
    if isinstance(raw, str) and raw.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    return text


def save(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> Path:
    """Write trajectories as JSON lines, one a line. The file appears whole or not at all."""
    lines = [json.dumps(trajectory.to_json()) + "\n" for trajectory in trajectories]
    return write_atomically(path, "".join(lines).encode("ascii"))


def load(path: str | os.PathLike[str]) -> list[Trajectory]:
    """Read a file written by `save`.

    Raises:
        TrajectoryError: naming the file and the line that cannot be read.
        FileNotFoundError: if there is no such file.
    """
    trajectories = []
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                if not isinstance(record, dict):
                    raise TrajectoryError("it is not a JSON object")
                trajectories.append(Trajectory.from_json(record))
            except (UnicodeDecodeError, json.JSONDecodeError, TrajectoryError) as error:
                raise TrajectoryError(f"{os.fspath(path)}, line {number}: {error}") from error
    return trajectories
