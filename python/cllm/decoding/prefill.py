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
from .capturing import capture

__all__ = ["MOST_KEPT", "STEP", "Prefills", "capture", "padded", "padded_width"]

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
    """[B, width], token 0 behind the prompts [B, P]."""
    return torch.nn.functional.pad(input_ids, (0, width - input_ids.shape[1]))


class Prefills:
    """The captured prefills of one `GraphedForward`, by width."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, Any] = OrderedDict()  # None: it could not be captured
        self._seen: set[int] = set()

    def find(self, width: int, make: Callable[[], Any], *, asked: bool) -> Any:
        """The capture of this width, made where there is none; None: there is none.

        Args:
            make: makes it, None where that fails.
            asked: somebody asked for captures; otherwise the width has to come a second time.
        """
        if width not in self._made:
            if not asked and width not in self._seen:
                self._seen.add(width)
                return None
            self._made[width] = make()
            while len(self._made) > MOST_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(width)
        return self._made[width]

    def clear(self) -> None:
        """Let go of all of them."""
        self._made.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of what they read."""
        return sum(one.nbytes for one in self._made.values() if one is not None)
