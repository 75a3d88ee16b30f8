"""What is raised for a configuration that cannot be used. Knows nothing of where configurations come from."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be used; its text has one line a fault, each naming the key and what to do.

    Attributes:
        errors: the lines, all faults that were found and not only the first.
    """

    def __init__(self, errors: str | Sequence[str]):
        self.errors = [errors] if isinstance(errors, str) else list(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        return "\n".join(self.errors)
