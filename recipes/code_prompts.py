"""Prompts to complete Python functions, those of this Python's standard library: signature and
docstring, as HumanEval asks (Chen et al. 2021, arXiv 2107.03374), but other functions.

    python recipes/code_prompts.py code_prompts.jsonl

or those of any folder of Python files:

    python recipes/code_prompts.py more.jsonl --library .venv/lib/python3.11/site-packages/torch
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import typer

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo"}


def prompts(library: Path, shortest: int = 40, longest: int = 700) -> Iterator[dict[str, str]]:
    """One row for every public function at the top of a module that has a docstring.

    Args:
        shortest, longest: characters of the docstring.
    """
    seen = set()
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if _LEFT_OUT & set(place.parts):
            continue
        try:
            module = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library carries broken files on purpose, for its own tests
        for node in module.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node)
            if text is None or not shortest <= len(text) <= longest or text in seen:
                continue
            seen.add(text)
            yield {"name": f"{place.with_suffix('')}.{node.name}", "prompt": _prompt(node, text)}


def _prompt(node: ast.FunctionDef, text: str) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    indented = text.replace("\n", "\n    ").replace("    \n", "\n")
    return f'def {node.name}({ast.unparse(node.args)}){returns}:\n    """ {indented}\n    """\n'


def main(output: Path, library: Path | None = None) -> None:
    """Write the prompts to OUTPUT, a file of JSON lines."""
    rows = list(prompts(library or Path(sysconfig.get_path("stdlib"))))
    if not rows:
        raise typer.BadParameter(f"{library} has no Python function with a docstring")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} prompts in {output}")


if __name__ == "__main__":
    typer.run(main)
