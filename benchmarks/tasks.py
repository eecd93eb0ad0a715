"""What benchmarks of held-out prompts share: the tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cllm.bench.tasks import Task
from cllm.evaluation import encode_prompts
from cllm.training.collect.sources import Columns, Source, read_source

_COLUMNS = ("prompt", "template", "id", "answer")


def token_caps(given: list[str] | None) -> dict[str, int]:
    """``["64", "gsm8k=128"]`` -> {"": 64, "gsm8k": 128}: most tokens of a text, "" for all tasks.

    Raises:
        ValueError: if one is no number.
    """
    caps = {}
    for entry in given or []:
        task, _, number = entry.rpartition("=")
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--max-new-tokens takes N or TASK=N, not {entry!r}")
        caps[task] = int(number)
    return caps


def read_tasks(
    path: Path,
    sources: dict[str, str],
    model: Any,
    tokenizer: Any,
    caps: dict[str, int] | None = None,
) -> list[Task]:
    """The tasks of a YAML file: name to the fields of `Source`, ``prompt`` or ``template``,
    ``answer`` (a column) and ``max_new_tokens``; `sources` replaces where they are read from,
    `caps` (of `token_caps`) bounds the tokens of a text."""
    import yaml

    tasks = []
    for name, given in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        fields = dict(given)
        columns = {key: fields.pop(key) for key in _COLUMNS if key in fields}
        most = fields.pop("max_new_tokens", 128)
        caps = caps or {}
        most = min(most, caps.get(name, caps.get("", most)))
        hub = fields.pop("source")
        fields["name"] = sources.get(name, hub)
        if name in sources:  # a local copy has one configuration
            fields.pop("config", None)
        answer = columns.pop("answer", None)
        source = Source(**fields)
        rows = read_source(source, Columns(**columns, response=answer))
        prompts = encode_prompts(model, tokenizer, [row.prompt for row in rows])
        answers = None if answer is None else [str(row.response) for row in rows]
        tasks.append(Task(name, prompts, answers, most))
    return tasks
