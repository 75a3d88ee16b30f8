"""The error that users see when their data cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from detr_ray.printable import printable

_LONGEST_VALUE = 80


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the ids, and says what to do."""


class UnlistedError(DataError):
    """A folder that is there and cannot be listed."""


def few(items: Sequence[Any], most: int = 5) -> str:
    """A list for a message, shortened to its first entries, on one line."""
    text = ", ".join(printable(str(item)) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def shown(value: Any, quoted: bool = True) -> str:
    """A value from a file for a message: on one line, not too long, text in quotes.

    Args:
        value: as JSON gives it.
        quoted: whether text is put in quotes.
    """
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:
        text = f"a number of {value.bit_length()} bits"  # Python refuses to write very long ones
    else:
        text = printable(value if isinstance(value, str) and not quoted else repr(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
