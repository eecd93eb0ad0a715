"""Recipe files: YAML with the settings of a command, by the names of its flags.

A file may hold one section a command (``collect:``, ``train:``), so that one file describes the way
from a model to a consistency LLM; settings beside the sections (``model:``) hold for all of them. A
file without sections holds the settings of the command that reads it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SECTIONS = ("collect", "train")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and the place in it."""


def read_recipe(
    path: str | os.PathLike[str],
    section: str,
    known: Collection[str],
    *,
    shared: Collection[str] = ("model", "seed"),
) -> dict[str, Any]:
    """The settings that a recipe file has for one command.

    Dashes and underscores in a key are the same. Numbers such as 1e-5 are numbers, although YAML
    1.1 reads them as text.

    Args:
        section: the command's name.
        known: the keys that the command takes.
        shared: keys that may stand beside the sections; the section's own win.

    Returns:
        Key, with underscores, to value.

    Raises:
        RecipeError: not YAML, not a mapping, an unknown or doubled key, a missing section; an
            unknown key with the nearest known one.
        OSError: if the file cannot be read.
    """
    name = os.fspath(path)
    content = _load(name)
    if not any(key in SECTIONS for key in content):
        return checked(content, known, name)
    outside = {key: value for key, value in content.items() if key not in SECTIONS}
    values = checked(outside, shared, name, extra=SECTIONS)
    if section not in content:
        raise RecipeError(f"{name} has no section {section!r}; add one, or leave sections out")
    inside = content[section]
    if inside is None:
        inside = {}
    if not isinstance(inside, dict):
        raise RecipeError(f"{name}: the section {section!r} holds no settings (key: value)")
    own = checked(inside, known, f"{name}, section {section}")
    return {key: value for key, value in values.items() if key in known} | own


def _check_keys(keys: Collection[str], known: Collection[str], where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        RecipeError: naming it, and the nearest known key if one is near.
    """
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{where}: unknown setting {key!r}{hint}")


def checked(
    values: Mapping[Any, Any], known: Collection[str], where: str, extra: Collection[str] = ()
) -> dict[str, Any]:
    """Settings by their names, in which a dash is an underscore.

    Raises:
        RecipeError: a key that is no name, is there twice, or in neither `known` nor `extra`.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise RecipeError(f"{where}: the key {key!r} is not a name")
        plain = key.replace("-", "_")
        if plain in found:
            raise RecipeError(f"{where}: the setting {plain!r} is there twice")
        found[plain] = value
    _check_keys(found, [*known, *extra], where)
    return found


def _load(name: str) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError as error:
        raise RecipeError(
            "recipes are YAML, which needs pyyaml; pip install 'cllm-kernels[train]'"
        ) from error

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number, and refuses a key that stands there twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = key_node.value
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise RecipeError(f"{name}, line {line}: the setting {key!r} is there twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    try:
        content = yaml.load(Path(name).read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: not UTF-8 text (byte {error.start + 1})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(
            f"{name}{place}: not YAML ({getattr(error, 'problem', error)})"
        ) from error
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"{name} holds no settings; it takes one `key: value` a line")
    return content
