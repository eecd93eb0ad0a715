"""The sizes that an adapter's metadata say it decodes best with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import AdapterError


def recorded_sizes(metadata: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(``block_size``, ``verify_size``) of an adapter's metadata; None for one they do not give.

    Raises:
        AdapterError: one is no integer >= 1, or `verify_size` is above `block_size`.
    """
    sizes = []
    for name in ("block_size", "verify_size"):
        value = metadata.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not whole:
            raise AdapterError(f"the adapter's metadata say {name} {value!r}, not an integer >= 1")
        sizes.append(value)
    block, verify = sizes
    if block is not None and verify is not None and verify > block:
        raise AdapterError(
            f"the adapter's metadata say verify_size {verify}, which is above block_size {block}"
        )
    return block, verify
