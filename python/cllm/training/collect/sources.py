"""Where prompts come from: files, folders and hub data sets; their columns, a choice of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...prompts import Prompt, PromptError, read_json_lines

Part = Literal["train", "holdout"]

_NEEDS_DATASETS = "reading it needs the package datasets; run: pip install 'cllm-kernels[train]'"
_FILES = {".parquet": "parquet", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True)
class Source:
    """What to read and which rows of it.

    Attributes:
        name: a JSONL file, a Parquet, CSV or JSON file, a folder (of such files, or of
            ``Dataset.save_to_disk``), or the name of a data set on the hub.
        config: the data set's configuration, where it has several.
        split: which split of a data set; a JSONL file has none.
        where: conditions ``COLUMN=VALUE`` or ``COLUMN!=VALUE`` on the value as text. Conditions
            with = on one column are alternatives, all others must hold together.
        holdout_by: the column that decides which rows are held out: rows with one value stay
            together, whatever else is in the data.
        holdout_share: about which share of the values is held out, 0 to 1. Whether a value is,
            depends on a hash of the value alone: the same on every machine and in every subset.
        take: the rows that are held out, or the rest.
        shuffle_seed: shuffle the rows with this seed; None keeps their order.
        skip: leave out so many rows in front, after all of the above: another choice for another
            purpose.
        limit: only this many rows, after all of the above.

    Raises:
        PromptError: naming the bad setting.
    """

    name: str
    config: str | None = None
    split: str = "train"
    where: Sequence[str] = ()
    holdout_by: str | None = None
    holdout_share: float = 0.0
    take: Part = "train"
    shuffle_seed: int | None = None
    skip: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.take not in ("train", "holdout"):
            raise PromptError(f"take must be 'train' or 'holdout', not {self.take!r}")
        if self.holdout_by is not None and not 0 < self.holdout_share < 1:
            raise PromptError(
                f"holdout_share must lie between 0 and 1, not {self.holdout_share!r}, where "
                f"holdout_by is {self.holdout_by!r}"
            )
        if self.holdout_by is None and (self.holdout_share or self.take == "holdout"):
            raise PromptError("a held-out share needs the column to hold out by (holdout_by)")
        if self.skip < 0:
            raise PromptError(f"skip must be at least 0, not {self.skip}")
        if self.limit is not None and self.limit < 1:
            raise PromptError(f"limit must be at least 1, not {self.limit}")


@dataclass(frozen=True)
class Columns:
    """How a row becomes a prompt.

    Attributes:
        prompt: the column with the prompt: text, or a chat as a list of ``{"role", "content"}``,
            of which everything up to the last user turn is the prompt.
        template: text with ``{column}`` fields instead of one column; ``{{`` is a brace.
        id: the column that names the row; None: the column "id" where there is one, else the
            row's number in the source, from 0.
        response: the column with the response that a model gave, text or token ids; None for none.
    """

    prompt: str = "prompt"
    template: str | None = None
    id: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the source as collecting uses it.

    Attributes:
        prompt: with its id.
        response: text or token ids, if `Columns.response` asked for it.
    """

    prompt: Prompt
    response: str | list[int] | None = None


@dataclass(frozen=True)
class FewShot:
    """What stands in front of every prompt.

    Attributes:
        turns: earlier turns of the chat.
        text: text in front of the prompt's own.
    """

    turns: Sequence[Mapping[str, str]] = ()
    text: str = ""

    def apply(self, prompt: Prompt) -> Prompt:
        """`prompt` with it in front."""
        before = [*self.turns, *prompt.before]
        if self.turns and prompt.before and prompt.before[0]["role"] == "system":
            before = [prompt.before[0], *self.turns, *prompt.before[1:]]
        return Prompt(prompt.id, self.text + prompt.text, prompt.line, before)


@dataclass
class _Numbered:
    number: int
    where: str
    line: int | None
    values: Mapping[str, Any] = field(default_factory=dict)


def read_source(source: Source, columns: Columns) -> list[Row]:
    """The chosen rows, in order.

    Raises:
        PromptError: if a file or a row is damaged, a column is missing, an id occurs twice, or no
            row is left; naming the place.
        OSError: if a file cannot be read.
    """
    rows: Iterable[_Numbered] = _where(_all_rows(source), source)
    if source.holdout_by is not None:
        rows = _held_out(rows, source.holdout_by, source.holdout_share, source.take)
    if source.shuffle_seed is not None:
        rows = list(rows)
        random.Random(source.shuffle_seed).shuffle(rows)
    found, seen = [], dict[str, str]()
    end = None if source.limit is None else source.skip + source.limit
    for row in itertools.islice(rows, source.skip, end):
        found.append(_row_of(row, columns))
        name = found[-1].prompt.id
        if name in seen:
            raise PromptError(
                f"{row.where}: the id {name!r} is that of {seen[name]} too; choose another id "
                "column"
            )
        seen[name] = row.where
    if not found:
        raise PromptError(f"{source.name}: no prompts in it{_choice(source)}")
    return found


def read_few_shot(path: str | os.PathLike[str], columns: Columns) -> FewShot:
    """Few-shot examples from a file.

    A ``.jsonl`` file holds earlier turns: rows with the source's columns, and the answer under
    "response" or "answer". Any other file is text that goes in front of each prompt.

    Raises:
        PromptError: naming the file and the line that is damaged.
        OSError: if it cannot be read.
    """
    name = os.fspath(path)
    if Path(name).suffix != ".jsonl":
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{name}: not UTF-8 text (byte {error.start + 1})") from error
        if not text.strip():
            raise PromptError(f"{name}: there is nothing in it")
        return FewShot(text=text)
    turns: list[Mapping[str, str]] = []
    for row in _json_rows(name):
        prompt = _prompt_of(row, columns)
        answer = next((row.values[key] for key in ("response", "answer") if key in row.values), "")
        if not isinstance(answer, str) or not answer.strip():
            raise PromptError(f'{row.where}: no answer under "response" or "answer"')
        turns += [*prompt.before, {"role": "user", "content": prompt.text}]
        turns.append({"role": "assistant", "content": answer})
    if not turns:
        raise PromptError(f"{name}: there is nothing in it")
    return FewShot(turns=turns)


def is_held_out(value: Any, share: float) -> bool:
    """Whether rows with this value belong to the held-out `share`; depends on nothing else."""
    digest = hashlib.sha256(str(value).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _all_rows(source: Source) -> Iterator[_Numbered]:
    path = Path(source.name).expanduser()
    if path.suffix == ".jsonl":
        if source.config is not None:
            raise PromptError(f"{source.name} is a file; it has no configuration {source.config!r}")
        return _json_rows(str(path))
    return _dataset_rows(source, path)


def _json_rows(name: str) -> Iterator[_Numbered]:
    for number, (line, values) in enumerate(read_json_lines(name)):
        where = f"{name}, line {line}"
        if not isinstance(values, dict):
            raise PromptError(f'{where}: expected an object like {{"prompt": "..."}}')
        yield _Numbered(number, where, line, values)


def _dataset_rows(source: Source, path: Path) -> Iterator[_Numbered]:
    data = _load_dataset(source, path)
    splits = getattr(data, "keys", None)
    if splits is not None:
        names = sorted(splits())
        if source.split not in names:
            raise PromptError(
                f"{source.name} has no split {source.split!r}; it has {', '.join(names)}"
            )
        data = data[source.split]
    for number, values in enumerate(data):
        yield _Numbered(number, f"{source.name}, row {number}", None, values)


def _load_dataset(source: Source, path: Path) -> Any:
    """A ``Dataset`` or a ``DatasetDict``."""
    looks_local = source.name.startswith((".", "~", os.sep)) or source.name.count("/") > 1
    if (looks_local or path.suffix in _FILES) and not path.exists():
        raise PromptError(f"there is no file or folder {source.name}")
    try:
        import datasets
    except ImportError as error:
        raise PromptError(f"{source.name}: {_NEEDS_DATASETS}") from error
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                return datasets.load_from_disk(str(path))
            return datasets.load_dataset(str(path), source.config)
        if path.is_file():
            if path.suffix not in _FILES:
                raise PromptError(
                    f"{source.name}: a file of prompts ends in .jsonl, {', '.join(_FILES)}"
                )
            return datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source.name, source.config)
    except PromptError:
        raise
    except Exception as error:
        # the library raises whatever a file, a builder or the network makes it raise
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise PromptError(f"cannot read the data set {source.name}: {reason}") from error


def _where(rows: Iterable[_Numbered], source: Source) -> Iterator[_Numbered]:
    allowed: dict[str, set[str]] = {}
    refused: list[tuple[str, str]] = []
    for condition in source.where:
        column, sign, value = condition.partition("=")
        if not sign or not column.rstrip("!"):
            raise PromptError(f"{condition!r} is no condition; write COLUMN=VALUE or COLUMN!=VALUE")
        if column.endswith("!"):
            refused.append((column[:-1], value))
        else:
            allowed.setdefault(column, set()).add(value)
    for row in rows:
        good = all(str(_value(row, column)) in values for column, values in allowed.items())
        if good and all(str(_value(row, column)) != value for column, value in refused):
            yield row


def _held_out(
    rows: Iterable[_Numbered], column: str, share: float, take: Part
) -> Iterator[_Numbered]:
    for row in rows:
        if is_held_out(_value(row, column), share) == (take == "holdout"):
            yield row


def _value(row: _Numbered, column: str) -> Any:
    if column not in row.values:
        names = ", ".join(map(str, row.values)) or "none"
        raise PromptError(f"{row.where}: there is no column {column!r}; there are: {names}")
    return row.values[column]


def _row_of(row: _Numbered, columns: Columns) -> Row:
    response = None
    if columns.response is not None:
        response = _value(row, columns.response)
        tokens = isinstance(response, Sequence) and all(type(token) is int for token in response)
        if not isinstance(response, str) and not tokens:
            raise PromptError(
                f"{row.where}: the response in {columns.response!r} is neither text nor a list of "
                "token ids"
            )
        if not isinstance(response, str):
            response = list(response)
    return Row(_prompt_of(row, columns), response)


def _prompt_of(row: _Numbered, columns: Columns) -> Prompt:
    name = _value(row, columns.id) if columns.id is not None else row.values.get("id", row.number)
    if columns.template is not None:
        value: Any = _fill(columns.template, row)
    else:
        value = _value(row, columns.prompt)
    before: list[Mapping[str, str]] = []
    if isinstance(value, Sequence) and not isinstance(value, str):
        before, value = _last_user_turn(value, row.where)
    if not isinstance(value, str):
        what = columns.prompt
        raise PromptError(
            f"{row.where}: {what!r} is a {type(value).__name__}, neither text nor a chat"
        )
    if not value.strip():
        raise PromptError(f"{row.where}: the prompt is empty")
    return Prompt(str(name), value, row.line, before)


def _last_user_turn(turns: Sequence[Any], where: str) -> tuple[list[Mapping[str, str]], str]:
    chat: list[Mapping[str, str]] = []
    for turn in turns:
        if not (
            isinstance(turn, Mapping)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
        ):
            raise PromptError(f'{where}: a turn of a chat is {{"role": "...", "content": "..."}}')
        chat.append({"role": turn["role"], "content": turn["content"]})
    users = [index for index, turn in enumerate(chat) if turn["role"] == "user"]
    if not users:
        raise PromptError(f"{where}: the chat has no turn of the user")
    return chat[: users[-1]], chat[users[-1]]["content"]


def _fill(template: str, row: _Numbered) -> str:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise PromptError(f"the prompt template {template!r}: {error}") from error
    if not fields:
        raise PromptError(f"the prompt template {template!r} names no {{column}}")
    values = {name: _value(row, name) for name in fields}
    pieces = []
    for text, name, _, _ in string.Formatter().parse(template):
        pieces.append(text)
        if name is not None:
            value = values[name]
            pieces.append(value if isinstance(value, str) else json.dumps(value, default=str))
    return "".join(pieces)


def _choice(source: Source) -> str:
    """What the rows were chosen by, for the message that none is left."""
    choice = [*source.where]
    if source.holdout_by is not None:
        choice.append(f"{source.take} part by {source.holdout_by}")
    return f" for {', '.join(choice)}" if choice else ""
