"""``--config recipe.yaml``: a command's options from a file, flags win."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from .common import CommandError


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
            values = read_recipe(value, section)
            flags = _flags(context.command.params)
            chosen = {}
            for name, setting in values.items():
                parameter = flags.get(str(name).replace("_", "-"))
                if parameter is None:
                    raise CommandError(
                        f"{value}: {name!r} is no option of cllm {section} "
                        f"(see cllm {section} --help)"
                    )
                if setting is not None:
                    chosen[parameter] = setting
            context.default_map = {**(context.default_map or {}), **chosen}
        return value

    return read


def _flags(parameters: Any) -> dict[str, str]:
    """Flag names without dashes in front to names of parameters."""
    flags = {}
    for parameter in parameters:
        if parameter.name not in ("config", "help"):
            for flag in (*parameter.opts, *parameter.secondary_opts):
                flags[flag.lstrip("-")] = parameter.name
    return flags


def read_recipe(path: Path, section: str) -> Mapping[str, Any]:
    """The settings of a recipe for one command.

    Raises:
        CommandError: if it is no YAML mapping, or PyYAML is not installed.
        OSError: if it cannot be read.
    """
    try:
        import yaml
    except ImportError as error:
        raise CommandError(
            f"{path}: reading it needs PyYAML; run: pip install 'cllm-kernels[train]'"
        ) from error
    try:
        values = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or "it cannot be read"
        raise CommandError(f"{path}{place}: not YAML ({reason})") from error
    if isinstance(values, dict) and section in values:
        values = values[section] or {}
    if not isinstance(values, dict):
        raise CommandError(f"{path}: expected options as `name: value`, one a line")
    return values
