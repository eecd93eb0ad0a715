"""Token text made visible: what a language model emits, as something one can see in a cell."""

from __future__ import annotations

import unicodedata

_NAMED = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}


def visible(text: str) -> str:
    """A token's text with white space and control characters as visible signs.

    Space becomes ``·``, newline ``⏎``, tab ``⇥``; other control characters their Unicode pictures;
    format characters and odd spaces (zero-width, directional, U+2028) ``<U+2028>``; the empty text
    ``∅``. A leading combining mark gets a dotted circle to sit on, a lone surrogate becomes U+FFFD.
    The result never holds a line break, never reorders its neighbours and always encodes as UTF-8.
    """
    if not text:
        return "∅"
    shown = "".join(_visible_character(character) for character in text)
    return "◌" + shown if unicodedata.combining(shown[0]) else shown


def _visible_character(character: str) -> str:
    named = _NAMED.get(character)
    if named is not None:
        return named
    category = unicodedata.category(character)
    if category == "Cc" and character < " ":
        return chr(0x2400 + ord(character))
    if category == "Cs":
        return "\ufffd"
    if category in ("Cc", "Cf", "Zl", "Zp", "Zs"):
        return f"<U+{ord(character):04X}>"
    return character


def encodable(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file can hold, replaced by U+FFFD."""
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters of one line of text, with an ellipsis where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: max(limit - 1, 0)].rstrip() + "…"
