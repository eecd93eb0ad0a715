"""The forward over the prompts, where it is one of few shapes: padded, and captured.

A forward over a short prompt takes a GPU less time than its launches take the host: some thousand
of them, with which a text of a few dozen tokens spends most of its time. Prompts are of all
lengths, so they are padded to the next `STEP` and one capture serves all of that width. Tokens
behind a prompt write slots that the text overwrites before it reads them, and change no bits of
those in front.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .cache import round_up
from .capturing import Capture, capture, new_pool

# Prompts are padded to multiples of so many tokens.
STEP = 64
# Captures of a forward, the latest widths.
MOST_KEPT = 8
# Beyond so many tokens, all rows', or weights times tokens, the device is busy for longer than the
# host needs to launch: 14 TFLOP are some 20 ms of a large GPU. Padding would only add to that, and
# a capture holds the activations of as many tokens.
MOST_TOKENS = 8192
MOST_PRODUCTS = 7e12


def padded_width(batch: int, width: int, weights: int) -> int | None:
    """The width that prompts [B, `width`] are padded to; None: they are long and stay as they are.

    Args:
        weights: of the model, their number.
    """
    wide = round_up(width, STEP)
    tokens = batch * wide
    return wide if tokens <= MOST_TOKENS and tokens * weights <= MOST_PRODUCTS else None


def padded(input_ids: torch.Tensor, width: int) -> torch.Tensor:
    """[B, width], each prompt's first token behind the prompts [B, P]."""
    batch, length = input_ids.shape
    if width == length:
        return input_ids
    return torch.cat([input_ids, input_ids[:, :1].expand(batch, width - length)], dim=1)


class Prefills:
    """The captured prefills of one `GraphedForward`, by width.

    They are replayed one after the other and leave nothing behind but keys and values, so that all
    work in the memory of the largest.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[int, Any] = OrderedDict()  # the latest last
        self._failed: set[int] = set()
        self._latest: dict[int, int] = {}  # the turns that widths came in
        self._turn = 0
        self._pool: Any = None

    def find(self, width: int, make: Callable[[], Any], *, asked: bool) -> Any:
        """The capture of this width, made where there is none; None: there is none.

        Args:
            make: makes it, None where that fails, which is not tried again.
            asked: somebody asked for captures. Otherwise the width has to come a second time, and
                where there are too many puts out only what has not come since its first: else
                widths that take turns would be captured in every call.
        """
        self._turn += 1
        before = self._latest.get(width)
        self._latest[width] = self._turn
        if width in self._failed:
            return None
        if width not in self._made:
            if not asked and (before is None or not self._room(before)):
                return None
            made = make()
            if made is None:
                self._failed.add(width)
                return None
            self._made[width] = made
            while len(self._made) > MOST_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(width)
        return self._made[width]

    def _room(self, before: int) -> bool:
        if len(self._made) < MOST_KEPT:
            return True
        return self._latest[next(iter(self._made))] < before

    def capture(self, run: Callable[[], torch.Tensor]) -> Capture:
        """`capturing.capture` into the memory of the others."""
        if self._pool is None:
            self._pool = new_pool()
        return capture(run, self._pool)

    def clear(self) -> None:
        """Let go of all of them."""
        self._made.clear()
        self._pool = None

    @property
    def nbytes(self) -> int:
        """Bytes of what they read."""
        return sum(one.nbytes for one in self._made.values())
