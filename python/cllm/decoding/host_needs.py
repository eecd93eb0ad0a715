"""Operations that a stream which is being captured cannot do, seen before it is captured.

A capture that fails on one of them leaves marks in torch (the stream, the generator of random
numbers). Where nobody asked for a capture there are to be none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# results or shapes that depend on values
_READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXED = {"_index_put_impl_", "index", "index_put", "index_put_"}
_COPIES = {"_to_copy", "copy_"}


class NoHost(TorchDispatchMode):
    """What runs in it may not need the host: RuntimeError, with the operation's name."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _needs_host(function._opname, args, kwargs):
            raise RuntimeError(f"{function} needs the host")
        return function(*args, **kwargs)


def _needs_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _READS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _INDEXED:
        indices = args[1] if len(args) > 1 else kwargs["indices"]
        places = [place for place in indices if place is not None]
        return any(place.dtype in (torch.bool, torch.uint8) for place in places)
    if name in _COPIES:
        own = args[0] if args else kwargs["self"]
        other = kwargs.get("device")
        if name == "copy_":
            other = (args[1] if len(args) > 1 else kwargs["src"]).device
        return other is not None and torch.device(other).type != own.device.type
    return False
