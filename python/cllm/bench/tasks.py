"""What is decoded, and what is finished of a long run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cllm_kernels

from ..files import write_atomically


@dataclass(frozen=True)
class Task:
    """Prompts of one kind.

    Attributes:
        prompts: token ids of each.
        answers: reference texts that end on a number, or None where there are none.
    """

    name: str
    prompts: list[list[int]]
    answers: list[str] | None
    max_new_tokens: int


class Kept:
    """Finished parts of a run on disk, each under a key of all that it depends on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """What was kept under `name` and `key`, made and kept where it is not there yet."""
        path = self._path(name, key)
        if not path.exists():
            write_atomically(path, json.dumps(make()).encode())
        return json.loads(path.read_text())

    def find(self, name: str, key: Any) -> Any:
        """What was kept under `name` and `key`, or None."""
        path = self._path(name, key)
        return json.loads(path.read_text()) if path.exists() else None

    def _path(self, name: str, key: Any) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{digest}.json"


@cache
def code_digest() -> str:
    """Names the code of both packages: what it measured is not taken for what other code would."""
    digest = hashlib.sha256()
    for package in (Path(cllm_kernels.__file__).parent, Path(__file__).parents[1]):
        files = (path for end in ("py", "so") for path in package.rglob(f"*.{end}"))
        for file in sorted(files):
            digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Names the weights, so that another model of the same folder is not taken for this one."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
