"""Objects for Ray Tune that must not be saved."""

from __future__ import annotations

from typing import Any


class Unsaved:
    """Base of objects that are pickled without content.

    Ray Tune pickles its arguments, to resume in another process. Searches here are resumed from their own files.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """An empty object for Tune's files."""
        return Unsaved, ()
