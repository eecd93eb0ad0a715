"""The colours and words that all forms of the report share.

Blue and red differ in lightness as well as in hue, so that the states stay apart in greyscale and
for readers who do not tell red from blue; every state also has a mark of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Style:
    """How a state looks: fill and text colour as ``#rrggbb``, and what it means."""

    fill: str
    ink: str
    meaning: str


FIXED = Style("#1d4ed8", "#ffffff", "fixed")
RIGHT = Style("#bfdbfe", "#1e3a8a", "right, not known yet")
WRONG = Style("#f87171", "#450a0a", "not yet right")

STYLES: dict[str, Style] = {"fixed": FIXED, "right": RIGHT, "wrong": WRONG}

FAST_FORWARDED = "#fbbf24"
STATIONARY = "#1e3a8a"

FAST_FORWARDED_MEANING = "fast-forwarded: came with another token in one forward"
STATIONARY_MEANING = "stationary: right behind a wrong token, and stayed"
