"""Why a store is of no use now, or ever."""

from __future__ import annotations


class UnreachableError(Exception):
    """A store that cannot be used now; the message says why and what to do. Records wait until it can."""


class UnusableError(UnreachableError):
    """A store that will never take a record as it is addressed."""
