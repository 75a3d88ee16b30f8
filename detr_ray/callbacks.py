"""Types of the functions through which work tells its caller how it goes."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Shows the user a line."""

Progress = Callable[[int, int], None]
"""Is told from time to time how many are done, and how many there are in all."""
