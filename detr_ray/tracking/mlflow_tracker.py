"""A tracker that never waits for MLflow: it writes to a log on disk, and a thread brings that to MLflow.

So a server that is away (at the start, in the middle, at the end) costs nothing but time until its numbers can be seen,
and a killed process loses nothing that it logged: the next one on the same folder sends it first, into the same run.
"""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

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
        folder: local folder of this training run, for the log and how much of it was sent. A folder that was used
            before goes on with its run.
        uri: address of the MLflow store (see ``tracking_uri``).
        experiment: name of the MLflow experiment; made if missing, restored if deleted.
        run_name: what MLflow shows as the run's name.
        run_uid: what the MLflow run is found by again, from any machine; None takes the folder's, or a new one.
        timing: time limits of sending.

    Raises:
        OSError: The folder cannot be written.
        ValueError: ``run_uid`` has characters that a search cannot hold, or the folder is another run's.
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
        """MLflow's id of the run; None while MLflow was never reached."""
        return self._sender.run_id

    def pending(self) -> Pending:
        """What has not reached MLflow."""
        return self._sender.pending()

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """Records settings; one that has another value than the run's first becomes the tag ``resume/<name>``."""
        if params:
            self._append("params", params={name: _as_text(value) for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one optimizer step."""
        if metrics:
            values = finite_or_not(metrics).items()
            plain = {name: value if math.isfinite(value) else repr(value) for name, value in values}
            self._append("metrics", step=int(step), metrics=plain)

    def log_text(self, text: str, path: str) -> None:
        """Stores a text among the run's artifacts; kept in the log until it is sent."""
        self._append("text", target=_named(artifact_path(path)), text=text)

    def log_file(self, local_path: str | Path, artifact_dir: str) -> None:
        """Stores a file or a folder's content among the run's artifacts; read when it is sent."""
        path = Path(local_path).absolute()
        folder = artifact_path(artifact_dir)
        target = f"{folder}/" if path.is_dir() else str(PurePosixPath(folder, path.name))
        self._append("file", target=target, path=str(path), dir=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the MLflow run."""
        if tags:
            self._append("tags", tags={name: str(value) for name, value in tags.items()})

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Records how the run ended and gives the sender a limited time to send what is left.

        What is still left then stays in the folder: it is sent when the run is resumed, or by ``send_pending``.

        Args:
            status: how the run ended.
            timeout_s: seconds to wait; None takes ``timing.finish``.
        """
        if self._finished:
            return
        self._append("finish", status=status)
        self._finished = True
        self._log.close()
        pending = self._sender.drain(self._timing.finish if timeout_s is None else timeout_s)
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


def send_pending(folder: str | Path, uri: str | None = None, timeout_s: float = 60.0) -> Pending:
    """Sends what a run could not send, and returns what is left.

    Args:
        folder: the folder of the run's tracker.
        uri: address of the MLflow store; None takes the run's own (which is kept without user and password).
        timeout_s: seconds to try.

    Raises:
        FileNotFoundError: The folder holds no tracked run.
    """
    place = Path(folder).resolve()
    settings = RunSettings.load(place)
    if settings is None:
        raise FileNotFoundError(f"{place} holds no tracked run: there is no readable run.json in it")
    if uri is not None:
        settings = RunSettings(uri, settings.experiment, settings.run_name, settings.run_uid)
    sender = Sender(place, settings, Timing(batch_interval=0.0))
    sender.start()
    pending = sender.drain(timeout_s)
    if pending:
        logger.warning("%s (%s)", pending, sender.last_error or "the time was over")
    return pending


def _as_text(value: Scalar) -> str:
    return value if isinstance(value, str) else str(value)


def _named(path: str) -> str:
    if not path:
        raise ValueError("a text needs a path among the artifacts, got an empty one")
    return path
