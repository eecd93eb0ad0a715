"""Fonts for the PNG: which characters can be drawn, and with what.

matplotlib warns once a character for every glyph that no font has, and draws a box. Asking the
fonts first keeps the warnings away and lets the caller put a sign of its own in the gap.
"""

from __future__ import annotations

from functools import lru_cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

# The first two come with matplotlib. The others are used where they are installed, in this order.
_BUNDLED = ("DejaVu Sans Mono", "DejaVu Sans")
_WORLD = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Symbols",
    "Noto Sans Symbols 2",
    "Noto Emoji",
    "Symbola",
)
_MISSING = "□"


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """Font families to try for each glyph, in order; all of them are installed."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return _BUNDLED + tuple(name for name in _WORLD if name in installed)


@lru_cache(maxsize=1)
def _covered() -> frozenset[int]:
    covered: set[int] = set()
    for name in families():
        path = font_manager.findfont(FontProperties(family=name))
        covered.update(font_manager.get_font(path).get_charmap())
    return frozenset(covered)


def drawable(text: str) -> str:
    """The text with every character that no installed font has replaced by ``□``."""
    covered = _covered()
    return "".join(letter if ord(letter) in covered else _MISSING for letter in text)


def font(size: float, *, bold: bool = False, mono: bool = False) -> FontProperties:
    """A font of ``size`` points that falls back to every family that `families` names."""
    mono_first = list(families())
    order = mono_first if mono else [mono_first[1], mono_first[0], *mono_first[2:]]
    return FontProperties(family=order, size=size, weight="bold" if bold else "normal")
