"""What Ray Tune is given and must not write down."""

from __future__ import annotations

from typing import Any


class Unsaved:
    """Ray Tune pickles what it is given, to go on in another process. Searches are resumed from their own files.

    An object of this kind is pickled without content.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Stands for it in Tune's files."""
        return Unsaved, ()
