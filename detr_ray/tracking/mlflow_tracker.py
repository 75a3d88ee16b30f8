"""A tracker that never waits for MLflow: it writes to a log on disk, and a thread sends the log to MLflow.

Training goes on while a server cannot be reached; the metrics arrive later. A killed process loses nothing that it
logged: the next process with the same folder sends the rest to the same MLflow run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from detr_ray.addresses import local_path, name_of
from detr_ray.callbacks import Say
from detr_ray.tracking.event_log import EventLog
from detr_ray.tracking.mlflow_run import RunSettings
from detr_ray.tracking.sender import Sender, Timing
from detr_ray.tracking.sent_state import Pending
from detr_ray.tracking.tracker import Scalar, Status, artifact_path, finite_or_not

logger = logging.getLogger(__name__)

_UID = re.compile(r"[\w.:/ -]{1,200}")


class MlflowTracker:
    """Writes one training run to one MLflow run.

    Args:
        folder: local folder of this training run, for the log and a note of how much of it was sent. With the folder
            of an earlier process, the tracker continues that run.
        uri: address of the MLflow store (see ``tracking_uri``).
        experiment: name of the MLflow experiment; made if missing, restored if deleted.
        run_name: what MLflow shows as the run's name.
        run_uid: identifies the MLflow run on any machine. None: the uid stored in the folder, or else a new one.
        timing: time limits of sending.

    Raises:
        OSError: The folder cannot be written.
        ValueError: ``run_uid`` has characters that MLflow cannot search for, or the folder belongs to another run.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        run_uid: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._folder = Path(folder).resolve()
        known = RunSettings.load(self._folder)
        self.run_uid = run_uid or (known.run_uid if known else uuid.uuid4().hex)
        if not _UID.fullmatch(self.run_uid):
            raise ValueError(f"run_uid must be letters, digits, blanks or _ . : / -, got {self.run_uid!r}")
        if known and known.run_uid != self.run_uid:
            raise ValueError(f"{self._folder} holds what run {known.run_uid} logged: run {self.run_uid} needs another")
        settings = RunSettings(uri, experiment, run_name, self.run_uid)
        self._log = EventLog(self._folder)
        settings.save(self._folder)
        self._timing = timing or Timing()
        self._sender = Sender(self._folder, settings, self._timing)
        self._finished = False
        self._append("start")
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow was reached."""
        return self._sender.run_id

    @property
    def last_error(self) -> str:
        """Why the last attempt to send failed; empty if it succeeded."""
        return self._sender.last_error

    def pending(self) -> Pending:
        """What has not reached MLflow."""
        return self._sender.pending()

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Records settings. The first value stays; a different later value becomes the tag ``resume/<name>``."""
        if params:
            self._append("params", params={name: str(value) for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one optimizer step."""
        if metrics:
            values = finite_or_not(metrics).items()
            plain = {name: value if math.isfinite(value) else repr(value) for name, value in values}
            self._append("metrics", step=int(step), metrics=plain)

    def log_text(self, text: str, path: str) -> None:
        """Stores a text as an artifact of the run."""
        self._append("text", target=_named(artifact_path(path)), text=text)

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """Stores a file, or the content of a local folder, as artifacts. Files are read when they are sent."""
        folder = artifact_path(artifact_dir)
        path = local_path(str(location))
        source = str(location if path is None else path)
        is_folder = path is not None and path.is_dir()
        target = f"{folder}/" if is_folder else str(PurePosixPath(folder, name_of(source)))
        self._append("file", target=target, path=source, dir=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the MLflow run."""
        if tags:
            self._append("tags", tags={name: str(value) for name, value in tags.items()})

    def sync(self) -> None:
        """Flushes the log to the disk."""
        self._log.sync()

    def finish(self, status: Status) -> None:
        """Records how the run ended, and waits up to ``timing.finish`` seconds for the sender.

        Anything unsent stays in the folder. It is sent when the run is resumed, or by ``send_pending``.
        """
        if self._finished:
            return
        self._append("finish", status=status)
        self._finished = True
        self._log.close()
        pending = self._sender.drain(self._timing.finish)
        if pending:
            reason = f" ({self._sender.last_error})" if self._sender.last_error else ""
            logger.warning("%s%s", pending, reason)
        if pending.left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in pending.left_out.items())
            logger.warning("not in MLflow and not waited for: %s", counts)

    def _append(self, kind: str, **fields: object) -> None:
        if self._finished:
            raise RuntimeError(f"nothing can be logged ({kind}) after the tracker was finished")
        self._log.append(kind, **fields)
        self._sender.wake()


def holds_records(folder: str | Path) -> bool:
    """Whether a folder is the folder of a tracker."""
    return RunSettings.load(Path(folder)) is not None


def recorded_uri(folder: str | Path) -> str:
    """The address of a run's MLflow store, without user and password.

    Raises:
        FileNotFoundError: The folder holds no tracked run.
    """
    return _settings(Path(folder)).tracking_uri


def send_pending(
    folder: str | Path, uri: str | None = None, timeout_s: float = 60.0, say: Say = lambda line: None
) -> Pending:
    """Sends the unsent records of a run, and returns what is still unsent.

    Args:
        folder: the folder of the run's tracker.
        uri: address of the MLflow store; None: the run's own, which is stored without user and password.
        timeout_s: seconds to try.
        say: called with a line of progress every few seconds.

    Raises:
        FileNotFoundError: The folder holds no tracked run.
    """
    place = Path(folder).resolve()
    settings = _settings(place)
    if uri is not None:
        settings = dataclasses.replace(settings, tracking_uri=uri)
    sender = Sender(place, settings, Timing(batch_interval=0.0))
    sender.start()
    pending = sender.drain(timeout_s, lambda left: say(f"{left.counts}; still to be sent"))
    if pending:
        logger.warning("%s (%s)", pending, sender.last_error or "the time was over")
    return pending


def _settings(folder: Path) -> RunSettings:
    settings = RunSettings.load(folder)
    if settings is None:
        raise FileNotFoundError(f"{folder} holds no tracked run: there is no readable run.json in it")
    return settings


def _named(path: str) -> str:
    if not path:
        raise ValueError("a text needs a path among the artifacts, got an empty one")
    return path
