"""The ``Tracker`` protocol, and two trackers that need nothing: one forgets, one remembers.

Calls are cheap and never fail because of a server. What they refuse (by ``TypeError`` or ``ValueError``) is a mistake
of the caller: a metric that is no number, a path that leaves the run's artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

Scalar = str | int | float | bool | None
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where one run's parameters, metrics and files go. Written by one process of a training run."""

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Records settings that hold for the whole run, once; a resumed run may give them again."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one optimizer step; not-a-number and infinities are kept as such."""

    def log_text(self, text: str, path: str) -> None:
        """Stores a text under this path of the run's artifacts; the last text of a path stays."""

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Stores a file, or the content of a local folder, in a folder of the run's artifacts ("" is the top).

        The location is a path, or the URI of a file (``s3://...``). The file is read later, so it must stay as it is
        until then. If it is gone by then it is left out and counted; if the same target was logged again meanwhile,
        only the last is stored. The target of a file is ``artifact_dir`` and its name, the target of a folder is
        ``artifact_dir``.
        """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets labels that may change later."""

    def sync(self) -> None:
        """Makes what was logged so far last beyond a loss of power. Belongs to each checkpoint: what came before one
        is never logged again.
        """

    def finish(self, status: Status) -> None:
        """Says how the run ended. Nothing can be logged afterwards; a second call does nothing."""


class NullTracker:
    """Tracks nothing: for ranks that do not report, and for runs without tracking."""

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
    """Keeps everything in this process: for tests and notebooks.

    Attributes:
        params: by name; the first value of a parameter stays.
        metrics: (step, values by name) in the order they came.
        texts: by path.
        files: (location, artifact folder) in the order they came; not copied.
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
        """Keeps the parameters that were not there before."""
        self.params = {**params, **self.params}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps the numbers."""
        self.metrics.append((int(step), finite_or_not(metrics)))

    def log_text(self, text: str, path: str) -> None:
        """Keeps the text."""
        self.texts[artifact_path(path)] = text

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Keeps where the file is."""
        self.files.append((str(location), artifact_path(artifact_dir)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Keeps the tags."""
        self.tags.update(tags)

    def sync(self) -> None:
        """Does nothing: memory does not last."""

    def finish(self, status: Status) -> None:
        """Keeps the first status."""
        self.status = self.status or status

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in the order they came."""
        return [(step, values[name]) for step, values in self.metrics if name in values]


def finite_or_not(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as Python floats, from numbers of any library.

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
    """A path below the run's artifacts, as it was given.

    Raises:
        ValueError: The path is absolute, or leads out of the artifacts.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"an artifact path must be relative, without '..' and with '/': got {path!r}")
    return "/".join(parts)
