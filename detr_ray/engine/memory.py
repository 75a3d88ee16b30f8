"""How a process that trains on the CPU keeps its memory."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Has glibc's allocator keep what is freed, instead of giving it back to the system and asking for it again.

    A step's activations come and go as blocks of tens of megabytes. By default each is mapped anew, and the system
    clears it page by page at its first use. The process holds its peak until it ends; the peak itself stays what it
    was. Does nothing where the allocator is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
