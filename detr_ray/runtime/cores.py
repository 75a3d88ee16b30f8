"""The cores of this machine. A module of its own, so that commands can ask without importing Ray or torch."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
