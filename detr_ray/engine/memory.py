"""How a process that trains on the CPU gives back memory that it does not need."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

MOST_OVER_NEED = 1.25
"""What a process may hold, as a multiple of what it held after a step that began without gaps in its heap."""

_STATM = Path("/proc/self/statm")


class HeldMemory:
    """Keeps what a process holds near what its largest step needs.

    Batches have ever other shapes, so that each step leaves gaps of other sizes in the heap: what lies free between two
    blocks in use stays with the allocator, and later blocks do not fit into it. What is held grows over hundreds of
    steps to several times what a step needs. Giving the gaps back costs the next step a fraction of its time: their
    pages are cleared anew when they are used again. So it is done only when there are many. No setting of the process
    changes. Does nothing where the allocator is not glibc's.
    """

    def __init__(self) -> None:
        self._need = 0
        self._without_gaps = True

    def after_step(self) -> bool:
        """Looks at what is held, and gives back what is free if that is much; whether it did."""
        held = resident_bytes()
        if self._without_gaps:
            self._need, self._without_gaps = max(self._need, held), False
        if held <= MOST_OVER_NEED * self._need:
            return False
        give_back_freed_memory()
        self._without_gaps = True
        return True


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_freed_memory() -> None:
    """Has glibc's allocator return what is free between blocks that are in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
