"""Progress of long work over many images: a line now and then, with the rate and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from detr_ray.engine.reporting.progress import duration

INTERVAL_S = 5.0


class Pace:
    """Says how far a piece of work is, not more often than a person wants to read it.

    Args:
        what: what the line starts with.
        say: shows the user a line.
        interval_s: least time between two lines.
    """

    def __init__(self, what: str, say: Callable[[str], None], interval_s: float = INTERVAL_S) -> None:
        self._what = what
        self._say = say
        self._interval_s = interval_s
        self._started = self._said = time.perf_counter()

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """Notes that so many images are done; says it, with ``more`` to say, if it is time."""
        now = time.perf_counter()
        if now - self._said < self._interval_s or not done:
            return
        self._said = now
        rate = done / (now - self._started)
        left = duration((total - done) / rate)
        self._say(
            f"{self._what} {done} of {total} images, {rate:.0f} images/s, {more + ', ' if more else ''}left {left}"
        )
