"""One request to MLflow: consecutive events of the log that are sent together, or one upload."""

from __future__ import annotations

import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from detr_ray.addresses import is_uri
from detr_ray.retries import Patience
from detr_ray.tracking.event_log import LoggedEvent
from detr_ray.tracking.mlflow_run import MlflowRun, Row

_MOST_LINES = 500
_STATUS_CHANGES = ("start", "finish")

# MLflow allows names of letters, digits, `_ - . : /` and spaces, at most 250 characters, that are normalised paths.
_FORBIDDEN = re.compile(r"[^\w.\-: /]")
_FORBIDDEN_PARTS = {"", ".", ".."}
_LONGEST_NAME = 250


class FileGoneError(Exception):
    """The file to upload does not exist any more."""


class EventBatch:
    """Metrics, parameters, tags and uploads of many events, or one change of the run's status.

    Attributes:
        lines: number of log lines in the batch.
        end: offset in the log, in bytes, after the last line of the batch.
        unreadable: number of lines that could not be parsed.
        uploads: artifact path of each text and file -> offset of its event in the log.
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

    def has_room_for(self, line: LoggedEvent) -> bool:
        """Whether the line may be added. A change of status needs a batch of its own, so that the order is kept."""
        if self.lines == 0:
            return True
        changes_status = line.event is not None and line.event["kind"] in _STATUS_CHANGES
        return self._set_status is None and not changes_status and self.lines < _MOST_LINES

    def add(self, line: LoggedEvent) -> None:
        """Adds a line. A line that cannot be parsed is only counted."""
        self.lines += 1
        self.end = line.end
        try:
            if line.event is None:
                raise ValueError("torn line")
            self._add_event(line.event, line.start)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.unreadable += 1

    def send(self, run: MlflowRun) -> None:
        """Sends metrics, parameters, tags and status. Uploads are sent by `upload`."""
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
    """Stores the text or file of one event.

    Raises:
        FileGoneError: The file, the folder or the event does not exist any more.
        RefusedError: MLflow rejects it, and will do so again.
        Exception: Any error of the artifact store; the upload may be tried again.
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
    """Downloads the file first, because MLflow's client uploads only local files."""
    from detr_ray.locations import download  # imports pyarrow, which runs in local folders do not need

    folder, _, name = target.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="upload-") as scratch:
        path = Path(scratch, name)
        try:
            download(location, path, Patience(attempts=1))  # the sender repeats the upload
        except FileNotFoundError as error:
            raise FileGoneError(f"{location} is gone") from error
        run.upload(path, folder)


def _with_clean_names(values: dict[str, Any]) -> dict[str, str]:
    names = clean_names(values)
    return {names[name]: str(value) for name, value in values.items()}


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Maps each name to a name that MLflow allows. Different names stay different.

    Allowed names stay as they are. In other names each forbidden character becomes ``_``. Where two names would become
    the same, a checksum of the original name is appended, so every run gets the same result.
    """
    cleaned = {name: _clean(name) for name in names}
    used = Counter(cleaned.values())
    return {
        name: clean if clean == name or used[clean] == 1 else _with_checksum(clean, name)
        for name, clean in cleaned.items()
    }


def _clean(name: str) -> str:
    parts = _FORBIDDEN.sub("_", name).split("/")
    clean = "/".join("_" if part in _FORBIDDEN_PARTS else part for part in parts)
    if clean.startswith(".."):
        clean = "_" + clean
    return clean if len(clean) <= _LONGEST_NAME else _with_checksum(clean, name)


def _with_checksum(clean: str, name: str) -> str:
    checksum = f"_{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"
    return clean[: _LONGEST_NAME - len(checksum)] + checksum
