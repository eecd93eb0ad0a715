"""Which calls get a graph that nobody asked for.

A capture pays where its shape comes again, so the first call of a shape goes without one. What
nobody asked for may not be felt: no text, no hook, little memory. So

- all calls of a shape that can get a graph have a cache of the same fixed size, the first one too:
  attention's sums are cut by that size, and in 16 bits texts would hang on how many calls there
  were before;
- a model that somebody watches, that is on several devices or in autocast goes without;
- the caches that are kept or in use have a bound, a capture pushes out none that is used more
  often, and a call whose capture another one works with goes without.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .cache import VIEW_STEP, round_up
from .config import Compile
from .graph_key import forward_key, watched
from .graphs import has_graphs
from .layouts import Layout
from .shelf import MOST_KEPT, failed, looked_at

# The KV caches of all captures together, where one was not asked for, take at most the device's
# memory divided by this.
CACHE_SHARE = 8
# Shapes of a model's latest calls that are remembered.
MOST_SHAPES = 64
# Where a cache that has its full size from the start costs memory alone. Under masks, attention
# would go over all of it in every forward.
_ATTENTIONS = ("native", "block")

_ticks = itertools.count(1)
_lock = threading.Lock()
# Of the latest calls of a model, by forward and what else is captured, when they were.
_calls: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """How the forwards of a call are run.

    Attributes:
        fixed: over a cache that has the size a capture's has.
        captured: by a graph; `automatic`: which nobody asked for.
        key: what tells the call from those that a capture of it does not serve; the forward's, and
            what of it is captured.
        nbytes: of its cache, as far as known.
    """

    fixed: bool = False
    captured: bool = False
    automatic: bool = False
    key: tuple | None = None
    nbytes: int = 0


PLAIN = Plan()


def plan_call(
    model: Any,
    compile: Compile | None,
    *,
    captured: tuple[str, tuple],
    recorded: bool,
    adapter: Any = None,
    **shape: Any,
) -> Plan:
    """How to run the forwards of a call.

    Args:
        captured: "iteration" or "window", and what a capture of it has fixed in it beside the
            forward.
        recorded: a trajectory is, so that somebody looks at each iteration.
        adapter, shape: arguments of `graphs.graphed_forward`.
    """
    if compile in ("off", "inductor"):
        return PLAIN
    shape["slots"] = round_up(shape["slots"], VIEW_STEP)
    device = shape["device"]
    nbytes = _cache_bytes(model, shape["batch"] * shape["slots"])
    if compile is None:
        if recorded or obstacle(model, device, shape["layout"]) is not None:
            return PLAIN
        if nbytes is None or nbytes > _most_bytes(device):
            return PLAIN
    of_forward = forward_key(model, **shape, adapter=adapter)
    key = of_forward, captured
    before = _note(model, key)
    if failed(model, key, automatic=compile is None):
        return Plan(fixed=True)
    if compile == "graph":
        return Plan(fixed=True, captured=True, key=key, nbytes=nbytes or 0)
    if before is None or not _admitted(model, key, before, nbytes or 0, device):
        return Plan(fixed=True)
    return Plan(fixed=True, captured=True, automatic=True, key=key, nbytes=nbytes or 0)


def obstacle(model: Any, device: torch.device, layout: Layout | None = None) -> str | None:
    """Why `model` gets no graph without being asked; None: it may get one.

    Args:
        layout: None: not known yet.
    """
    if not has_graphs(device):
        return f"there are no graphs on {device}"
    if layout is not None and (layout.right_aligned or layout.attention not in _ATTENTIONS):
        return f"its layout is {layout}"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    parameters = list(model.parameters())
    if any(parameter.device != device for parameter in parameters):
        return "its weights are not all where its input is"
    if any(is_traceable_wrapper_subclass(parameter) for parameter in parameters):
        return "its weights are tensors made of others, which have no address"
    return "somebody watches it" if watched(model) else None


def _note(model: Any, key: tuple) -> int | None:
    """When the latest call of this key was; the present one is from now on."""
    with _lock:
        calls = _calls.setdefault(model, OrderedDict())
        before = calls.pop(key, None)
        calls[key] = next(_ticks)
        while len(calls) > MOST_SHAPES:
            calls.popitem(last=False)
    return before


def _admitted(model: Any, key: tuple, before: int, nbytes: int, device: torch.device) -> bool:
    """Whether there is a capture for such calls, which no other call works with, or room for one.
    Room is made by putting out what was last used before `before`, the latest such call: else
    shapes that take turns would capture anew in every call."""
    of_forward, (kind, wanted) = key
    with _lock:
        calls = dict(_calls.get(model) or {})
    with looked_at(model, device) as found:
        kept = found.kept
        if of_forward in found.busy:
            return False
        if of_forward in kept:
            forward = kept[of_forward]
            made = list(forward.windows if kind == "window" else forward.iterations)
            times = [calls.get((of_forward, (kind, one)), 0) for one in made]
            return wanted in made or len(made) < MOST_KEPT or min(times) < before
        used = {one: 0 for one in kept}
        for (one, _), when in calls.items():
            if one in used:
                used[one] = max(used[one], when)
        stay = [one for one in kept if used[one] > before]
        places = MOST_KEPT - len(found.busy)
        free = _most_bytes(device) - found.others - nbytes

        def fits() -> bool:
            return len(kept) < places and sum(f.nbytes for f in kept.values()) <= free

        if len(stay) >= places or sum(kept[one].nbytes for one in stay) > free:
            return False
        while not fits():
            del kept[min((one for one in kept if one not in stay), key=lambda one: used[one])]
        return True


def _cache_bytes(model: Any, slots: int) -> int | None:
    """Bytes of a KV cache with room for so many tokens; None where the model's configuration does
    not tell."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * slots * heads * size * model.dtype.itemsize)
    except (AttributeError, TypeError):
        return None


def _most_bytes(device: torch.device) -> int:
    return _device_bytes(device) // CACHE_SHARE


def _device_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)
