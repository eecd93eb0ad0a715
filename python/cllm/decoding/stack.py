"""All native layers of a model over one cache, as one call on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import cllm_kernels
from cllm_kernels import DecoderStack

from ..linears import changes, gates
from .cache import BlockPlan, RaggedCache

if TYPE_CHECKING:
    from .layers import NativeLayer


class LayerStack:
    """All decoder layers of a model over one cache, as one call.

    Weights, caches and terms of thirty layers take milliseconds to look up; here that is done when
    one of them has changed.

    Attributes:
        latest: what this forward's call gave, until the last layer has handed it on: a layer that
            is handed this has been run already.
    """

    def __init__(self, natives: tuple[NativeLayer, ...], plan: BlockPlan):
        self.latest: torch.Tensor | None = None
        self.first, self.last = natives[0], natives[-1]
        self._natives = natives
        self._members = frozenset(natives)
        self._watched = [
            (one.layer.__dict__, one, one.layer._forward_hooks, one.layer._forward_pre_hooks)
            for one in natives
        ]
        # not the cache: it has this, and a cycle would keep its memory for long
        self._plan = plan
        self._capacity = plan.capacity
        self._changes = changes()
        self._gates = gates(linear for native in natives for linear in native.linears)
        # by the gates that are open
        self._stacks: dict[tuple[Any, ...], DecoderStack] = {}

    def __contains__(self, native: NativeLayer) -> bool:
        return native in self._members

    def in_place(self) -> bool:
        """Whether a layer's call is still nothing but ours: no forward but its native one, and no
        hook that has come since."""
        for own, native, hooks, before in self._watched:
            if hooks or before or getattr(own.get("forward"), "__self__", None) is not native:
                return False
        return True

    def outdated(self) -> bool:
        """Whether the cache has grown, or an adapter has come or gone."""
        return self._capacity != self._plan.capacity or self._changes != changes()

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RaggedCache
    ) -> torch.Tensor:
        """hidden [B, n, H], cos and sin [B or 1, n, D] -> [B, n, H]."""
        plan, opened = self._plan, {gate: rows for gate in self._gates if (rows := gate())}
        assert plan.lengths is not None
        if len(set(opened.values())) > 1:
            raise RuntimeError("several adapters are on in one forward of the decoder layers")
        rows = next(iter(opened.values()), None)
        check_rows(rows, hidden.shape[:2])
        key = tuple(opened)
        stack = self._stacks.get(key)
        if stack is None:
            stack = self._stacks[key] = self._made(hidden, cache)
        self.latest = cllm_kernels.decoder_layers(
            hidden,
            stack,
            cos,
            sin,
            plan.lengths,
            guesses_from=plan.guesses_from,
            guess_width=plan.guess_width,
            gated_from=None if rows is None else rows[0],
        )
        return self.latest

    def _made(self, hidden: torch.Tensor, cache: RaggedCache) -> DecoderStack:
        natives = self._natives
        caches = [native.caches(cache, hidden) for native in natives]
        return DecoderStack(
            [native.with_terms(hidden.shape[:2])[0] for native in natives],
            [keys for keys, _ in caches],
            [values for _, values in caches],
            eps=self.first.eps,
            scale=self.first.scale,
            windows=[native.window for native in natives],
        )


def check_rows(rows: tuple[int, int, int] | None, shape: torch.Size) -> None:
    """That an adapter's rows are those of a forward over `shape` tokens, [B, n].

    Raises:
        RuntimeError: they are not.
    """
    if rows is not None and rows[1:] != tuple(shape):
        raise RuntimeError(
            f"an adapter is on for forwards over [{rows[1]}, {rows[2]}] tokens, but a decoder "
            f"layer was given {list(shape)}"
        )
