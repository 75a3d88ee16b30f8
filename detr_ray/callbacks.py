"""Types of callback functions for messages and progress."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Shows the user a line."""

Progress = Callable[[int, int], None]
"""Called from time to time with the number of things that are done, and of all."""
