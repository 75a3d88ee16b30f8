"""The error that users see when their data cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the ids, and says what to do."""


def few(items: Sequence[Any], most: int = 5) -> str:
    """A list for a message, shortened to its first entries."""
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
