"""The error of exports that is meant for users."""

from __future__ import annotations


class ExportError(Exception):
    """A model that cannot be exported, or a file whose results are not the model's."""
