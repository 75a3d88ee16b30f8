"""Text from data as it may be shown: nothing in it moves a terminal's cursor, begins a line or cannot be encoded.

Names of files and categories come from others. Shown as they are, an escape sequence in one would hide what stands
before it, a line break would look like a message of this program, and half of a surrogate pair would end the program.
"""

from __future__ import annotations

import unicodedata

# Controls, surrogates, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Overrides of the writing direction: what follows would be shown in another order.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""A name on one line, with what cannot be shown written as ``\n``, ``\x1b`` or ``\udc80``."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which stay."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(text: str, longest: int) -> str:
    """The text, cut to ``longest`` characters, with dots at the end where something was cut off."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN and character not in _TURNING:
        return character
    return character.encode("unicode_escape").decode("ascii")
