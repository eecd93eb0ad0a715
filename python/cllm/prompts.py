"""Prompts: the ones that ship with the package, files of them, and their way into token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHIPPED = ("gsm8k", "humaneval")

_COMPLETE = "Complete this Python function. Write the whole function.\n\n```python\n{header}```"


class PromptError(ValueError):
    """A prompt, or a file of prompts, that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: what to call it in tables and reports.
        text: what the user says.
        line: the line of the prompts file that it came from (from 1), None elsewhere.
        before: the chat up to there, turns of ``{"role": ..., "content": ...}``.
    """

    id: str
    text: str
    line: int | None = None
    before: Sequence[Mapping[str, str]] = ()

    @property
    def where(self) -> str:
        """How to name it in an error."""
        return "the prompt" if self.line is None else f"the prompt of line {self.line}"


def shipped_prompts() -> list[Prompt]:
    """The demo's prompts, GSM8K and HumanEval in turn (20 each; see ``data/README.md``)."""
    sets: list[list[Prompt]] = []
    for name in SHIPPED:
        text = (resources.files("cllm") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        frame = _COMPLETE if name == "humaneval" else "{header}"
        sets.append([Prompt(row["id"], frame.format(header=row["prompt"])) for row in rows])
    return [prompt for pair in zip(*sets, strict=True) for prompt in pair]


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a JSONL file with one ``{"prompt": "..."}`` a line; an ``"id"`` is kept if it is there.

    Blank lines are skipped.

    Raises:
        PromptError: naming the file and the first line that is damaged, or if there is no prompt.
        OSError: if the file cannot be read.
    """
    name = os.fspath(path)
    prompts: list[Prompt] = []
    for number, row in read_json_lines(path):
        prompts.append(_prompt_of(row, f"{name}, line {number}", number, len(prompts)))
    if not prompts:
        raise PromptError(f'{name}: no prompts in it; it takes one {{"prompt": "..."}} a line')
    return prompts


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """The values of a file with one JSON value a line, each with its line's number (from 1).

    Blank lines are skipped.

    Raises:
        PromptError: naming the file and the first line that is damaged.
        OSError: if the file cannot be read.
    """
    name = os.fspath(path)
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise PromptError(
                    f"{name}, line {number}: not UTF-8 text (byte {error.start + 1})"
                ) from error
            except json.JSONDecodeError as error:
                raise PromptError(
                    f"{name}, line {number}: not JSON ({error.msg} at column {error.colno})"
                ) from error
            yield number, value


def _prompt_of(row: Any, where: str, number: int, index: int) -> Prompt:
    if not isinstance(row, dict):
        raise PromptError(f'{where}: expected an object like {{"prompt": "..."}}')
    if "prompt" not in row:
        raise PromptError(f'{where}: the key "prompt" is missing')
    text = row["prompt"]
    if not isinstance(text, str):
        raise PromptError(f'{where}: "prompt" is a {type(text).__name__}, not a string')
    if not text.strip():
        raise PromptError(f"{where}: the prompt is empty")
    return Prompt(str(row.get("id", index)), text, number)


def encode(
    tokenizer: Any,
    prompt: Prompt,
    *,
    system: str | None = None,
    chat_template: bool = True,
) -> torch.Tensor:
    """Token ids [P] int64 of a prompt, as a chat turn if the tokenizer has a chat template.

    Args:
        system: a system message in front; needs a chat template.
        chat_template: False feeds the text as it stands.

    Raises:
        PromptError: if the prompt is empty, makes no tokens, or a system message or earlier turns
            have no template.
    """
    import torch

    if not prompt.text.strip():
        raise PromptError(f"{prompt.where} is empty; give it some text")
    templated = chat_template and bool(getattr(tokenizer, "chat_template", None))
    if not templated and (system is not None or prompt.before):
        reason = "this tokenizer has none" if chat_template else "it is switched off"
        what = "a system message needs" if system is not None else "earlier turns need"
        raise PromptError(f"{what} a chat template, and {reason}")
    if templated:
        messages = [*map(dict, prompt.before), {"role": "user", "content": prompt.text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except Exception as error:
            # a template is a program of the model's author: it raises what it likes
            raise PromptError(
                f"the model's chat template refused {prompt.where}: {error}"
            ) from error
    else:
        ids = tokenizer(prompt.text)["input_ids"]
    if not ids:
        raise PromptError(f"{prompt.where} makes no tokens with this tokenizer")
    return torch.tensor(ids, dtype=torch.int64)


def context_length(model: Any) -> int | None:
    """Most tokens that the model's positions allow, None where its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if length:
            return int(length)
    return None


def check_length(model: Any, prompt: Prompt, ids: torch.Tensor) -> None:
    """Raise `PromptError` if token ids [P] of `prompt` leave no room in the model's context."""
    limit = context_length(model)
    if limit is not None and ids.numel() >= limit:
        raise PromptError(
            f"{prompt.where} has {ids.numel()} tokens, but the model's context is {limit}; "
            "shorten it"
        )
