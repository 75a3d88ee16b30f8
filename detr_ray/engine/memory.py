"""How a process that trains on the CPU gives back memory."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_freed_memory() -> None:
    """Has glibc's allocator return what is free between the blocks that are in use.

    Each step leaves blocks of other sizes behind, because its images have other sizes. What is freed between two blocks
    that stay is kept by the allocator, and the next step's blocks do not fit into it: what a process holds grows over
    hundreds of steps to several times what its largest step needs. Returning it changes no setting of the process.
    Does nothing where the allocator is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
