"""Makes text from data sets safe to print.

Names of files and categories are written by others. Without escaping, an escape sequence in a name could hide other
output, a line break could imitate a message of this program, and half of a surrogate pair would crash it.
"""

from __future__ import annotations

import unicodedata

# Controls, surrogates, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Characters that change the writing direction, and so the order in which text is shown.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""The text on one line, with control characters escaped as ``\n``, ``\x1b`` or ``\udc80``."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_lines(text: str) -> str:
    """Like `printable`, but keeps line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(text: str, longest: int) -> str:
    """The text, cut to ``longest`` characters, with dots at the end where something was cut off."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where that is right."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def is_encodable(text: str) -> bool:
    """Whether text can be written as UTF-8: it has no half of a surrogate pair, as names in other encodings get."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN and character not in _TURNING:
        return character
    return character.encode("unicode_escape").decode("ascii")
