"""``--config recipe.yaml``: a command's options from a file, flags win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..training.recipe import read_recipe


def config_option(section: str) -> Any:
    """The option ``--config`` of the command `section`.

    The file is a YAML mapping of flag names without their dashes in front to values. If it has a
    key named like the command, what stands under that key counts: so one recipe serves several
    commands.
    """
    return typer.Option(
        "--config",
        metavar="RECIPE.yaml",
        is_eager=True,
        callback=_reader(section),
        help="Take options from this file, by their names here; flags win.",
    )


def _reader(section: str) -> Callable[..., Path | None]:
    # the library recognises the context by its annotation
    def read(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            flags = _flags(context.command.params)
            values = read_recipe(value, section, list(flags))
            chosen = {flags[name]: setting for name, setting in values.items()}
            chosen = {name: setting for name, setting in chosen.items() if setting is not None}
            context.default_map = {**(context.default_map or {}), **chosen}
        return value

    return read


def _flags(parameters: Any) -> dict[str, str]:
    """Flag names, with underscores and without dashes in front, to names of parameters."""
    flags = {}
    for parameter in parameters:
        if parameter.name not in ("config", "help"):
            for flag in (*parameter.opts, *parameter.secondary_opts):
                flags[flag.lstrip("-").replace("-", "_")] = parameter.name
    return flags
