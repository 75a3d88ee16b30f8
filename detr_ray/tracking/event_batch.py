"""Events of the log in a row that can be sent together, and the sending of one upload."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detr_ray.addresses import is_uri
from detr_ray.retries import Patience
from detr_ray.tracking.event_log import LoggedEvent
from detr_ray.tracking.logged_points import Row
from detr_ray.tracking.mlflow_run import MlflowRun
from detr_ray.tracking.naming import clean_names

_LONGEST = 500
_STATUS_CHANGES = ("start", "finish")


class FileGoneError(Exception):
    """What was to be uploaded is not there any more."""


class EventBatch:
    """Values of any kind, or one change of the run's status.

    Attributes:
        lines: how many lines of the log it holds.
        end: offset of the line after its last.
        unreadable: how many of the lines could not be understood.
        uploads: target -> offset of the event, of the texts and files among them.
    """

    def __init__(self) -> None:
        self.lines = 0
        self.end = 0
        self.unreadable = 0
        self.uploads: dict[str, int] = {}
        self._metrics: list[Row] = []
        self._params: list[dict[str, str]] = []
        self._tags: dict[str, str] = {}
        self._set_status: Callable[[MlflowRun], None] | None = None

    def takes(self, line: LoggedEvent) -> bool:
        """Whether this line may still join: a change of status stays alone, so that the order is kept."""
        if self.lines == 0:
            return True
        changes_status = line.event is not None and line.event["kind"] in _STATUS_CHANGES
        return self._set_status is None and not changes_status and self.lines < _LONGEST

    def add(self, line: LoggedEvent) -> None:
        """Takes a line in; one that cannot be understood is counted."""
        self.lines += 1
        self.end = line.end
        try:
            if line.event is None:
                raise ValueError("torn line")
            self._add_event(line.event, line.start)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.unreadable += 1

    def send(self, run: MlflowRun) -> None:
        """Sends all values that were taken in; uploads are left to ``upload``."""
        for params in self._params:
            run.log_params(params)
        run.set_tags(self._tags)
        run.log_metrics(self._metrics)
        if self._set_status is not None:
            self._set_status(run)

    def _add_event(self, event: dict[str, Any], offset: int) -> None:
        time_ms = int(event["t"])
        match event["kind"]:
            case "metrics":
                names = clean_names(event["metrics"])
                step = int(event["step"])
                values = event["metrics"].items()
                self._metrics += [(names[name], float(value), time_ms, step) for name, value in values]
            case "params":
                self._params.append(_with_clean_names(event["params"]))
            case "tags":
                self._tags |= _with_clean_names(event["tags"])
            case "text" | "file":
                self.uploads[event["target"]] = offset
            case "start":
                self._set_status = MlflowRun.set_running
            case "finish":
                status = str(event["status"])
                self._set_status = lambda run: run.set_ended(status, time_ms)
            case _:
                raise ValueError(f"unknown kind of event {event['kind']!r}")


def upload(run: MlflowRun, line: LoggedEvent | None) -> None:
    """Stores the text or file that an event speaks of.

    Raises:
        FileGoneError: The file, the folder or the event is not there any more.
        RefusedError: MLflow will never take it.
        Exception: Whatever the store of the artifacts raises; it may be tried again.
    """
    if line is None or line.event is None:
        raise FileGoneError("its line in the log cannot be read any more")
    event = line.event
    if event["kind"] == "text":
        run.upload_text(event["text"], event["target"])
        return
    if is_uri(event["path"]):
        _upload_remote(run, event["path"], event["target"])
    else:
        _upload_local(run, Path(event["path"]), event["dir"])


def _upload_local(run: MlflowRun, path: Path, artifact_dir: str) -> None:
    if not path.exists():
        raise FileGoneError(f"{path} is gone")
    try:
        run.upload(path, artifact_dir)
    except OSError as error:
        if not path.exists():
            raise FileGoneError(f"{path} went away while it was read") from error
        raise


def _upload_remote(run: MlflowRun, location: str, target: str) -> None:
    """Fetches a file first: MLflow's client sends files of this machine only."""
    from detr_ray.locations import download  # and with it pyarrow, which runs in folders do without

    folder, _, name = target.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="upload-") as scratch:
        path = Path(scratch, name)
        try:
            download(location, path, Patience(attempts=1))  # the sender tries again
        except FileNotFoundError as error:
            raise FileGoneError(f"{location} is gone") from error
        run.upload(path, folder)


def _with_clean_names(values: dict[str, Any]) -> dict[str, str]:
    names = clean_names(values)
    return {names[name]: str(value) for name, value in values.items()}
