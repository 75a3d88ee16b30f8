"""Names that MLflow takes: letters, digits, ``_ - . : /`` and spaces, at most 250 characters, in path form."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable

_REFUSED = re.compile(r"[^\w.\-: /]")
_NOT_A_STEP = {"", ".", ".."}
_LONGEST = 250


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """For each name the name MLflow gets; different names stay different.

    A name that MLflow takes stays as it is. In others each refused character becomes ``_``; where two names would
    become one, a checksum of the original is appended, so that the result is the same in each run.
    """
    cleaned = {name: _clean(name) for name in names}
    used = Counter(cleaned.values())
    return {
        name: clean if clean == name or used[clean] == 1 else _with_checksum(clean, name)
        for name, clean in cleaned.items()
    }


def _clean(name: str) -> str:
    steps = _REFUSED.sub("_", name).split("/")
    clean = "/".join("_" if step in _NOT_A_STEP else step for step in steps)
    if clean.startswith(".."):
        clean = "_" + clean
    return clean if len(clean) <= _LONGEST else _with_checksum(clean, name)


def _with_checksum(clean: str, name: str) -> str:
    checksum = f"_{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"
    return clean[: _LONGEST - len(checksum)] + checksum


def shortened(text: str, longest: int) -> str:
    """The text, cut to ``longest`` characters with dots at its end where it was longer."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
