"""The ``Tracker`` protocol, and two trackers without a store: `NullTracker` and `MemoryTracker`.

Calls are cheap and never fail because of a server. They raise ``TypeError`` for a metric that is not a number, and
``ValueError`` for a path outside the run's artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

Scalar = str | int | float | bool | None
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Records parameters, metrics and files of one run. Only one process of a training run uses it."""

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Records settings of the whole run; a resumed run may record them again."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one optimizer step; NaN and infinities are allowed."""

    def log_text(self, text: str, path: str) -> None:
        """Stores a text as an artifact; a later text with the same path replaces it."""

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Stores a file, or the content of a local folder, in a folder of the run's artifacts ("" is the top).

        The location is a path, or the URI of a file (``s3://...``). The file is read later and must not change until
        then; if it was deleted, it is left out and counted. A file is stored as ``artifact_dir`` and its name, the
        content of a folder in ``artifact_dir``. If the same artifact is logged again before it is stored, only the
        last file is stored.
        """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets labels that may change later."""

    def sync(self) -> None:
        """Makes all records survive a loss of power. Call it with each checkpoint: a resumed run does not log the steps
        before its checkpoint again.
        """

    def finish(self, status: Status) -> None:
        """Records how the run ended. Nothing can be logged afterwards; a second call does nothing."""


class NullTracker:
    """Records nothing: for ranks that do not report, and for runs without tracking."""

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_text(self, text: str, path: str) -> None:
        """Does nothing."""

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def finish(self, status: Status) -> None:
        """Does nothing."""


@dataclass
class MemoryTracker:
    """Keeps all records in memory, for tests and notebooks.

    Attributes:
        params: by name; the first value of a parameter stays.
        metrics: (step, values by name) in the order of the calls.
        texts: by path.
        files: (location, artifact folder) in the order of the calls; the files are not copied.
        tags: by name.
        status: how the run ended, or None.
    """

    params: dict[str, Scalar] = field(default_factory=dict)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: Status | None = None

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Keeps the first value of each parameter."""
        self.params = {**params, **self.params}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps the numbers."""
        self.metrics.append((int(step), finite_or_not(metrics)))

    def log_text(self, text: str, path: str) -> None:
        """Keeps the text."""
        self.texts[artifact_path(path)] = text

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Keeps the location of the file."""
        self.files.append((str(location), artifact_path(artifact_dir)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Keeps the tags."""
        self.tags.update(tags)

    def sync(self) -> None:
        """Does nothing."""

    def finish(self, status: Status) -> None:
        """Keeps the first status."""
        self.status = self.status or status

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in the order of the calls."""
        return [(step, values[name]) for step, values in self.metrics if name in values]


def finite_or_not(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as Python floats; numpy and torch numbers are converted.

    Raises:
        TypeError: A value is not a number; the message names the metric.
    """
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number, got {value!r}") from error
    return values


def artifact_path(path: str) -> str:
    """Checks the path of an artifact and returns it in normal form.

    Raises:
        ValueError: The path is absolute, or contains ``..`` or a backslash.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"an artifact path must be relative, without '..' and with '/': got {path!r}")
    return "/".join(parts)
