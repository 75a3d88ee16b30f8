"""The progress of a run, as a small file in its folder, for other processes that watch the run.

The file is replaced after each logging interval and each evaluation, and otherwise twice a minute to show that the
process is alive. A thread writes it, at most every few seconds, so that slow storage does not delay training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from detr_ray.addresses import is_remote, join
from detr_ray.locations import read_bytes, write_bytes
from detr_ray.retries import Patience, reason_of
from detr_ray.tracking.tracker import Scalar, Status, Tracker, finite_or_not

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
BEAT_S = 30.0
"""The file is written at least this often while the process lives."""
_EVERY_S = 1.0
_EVERY_REMOTE_S = 10.0
_LAST_WRITE_S = 15.0
_BRIEFLY = Patience(attempts=2, give_up_after_s=10.0)

RunStatus = Literal["running", "finished", "stopped", "failed"]
_STATUS_OF: dict[Status, RunStatus] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclasses.dataclass(frozen=True, slots=True)
class RunProgress:
    """The progress of a run.

    Attributes:
        run: its name.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch.
        status: status of its last process.
        started: when this process began, in seconds since 1970 by its own clock.
        written: when this was written, by the same clock.
        step: the last step whose metrics are known.
        metrics: of the logging interval that ended with it, by their public names; empty before the first.
        evaluations: step -> numbers of each evaluation, oldest first, without those of single categories.
    """

    run: str
    total_steps: int
    steps_per_epoch: int
    status: RunStatus = "running"
    started: float = 0.0
    written: float = 0.0
    step: int = 0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluations: Mapping[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of the file. Numbers that are not finite become null."""
        values = dataclasses.asdict(self) | {
            "metrics": _finite(self.metrics),
            "evaluations": {str(step): _finite(numbers) for step, numbers in self.evaluations.items()},
        }
        return json.dumps(values, allow_nan=False, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> RunProgress:
        """The inverse of `to_json`; keys that this version does not know are ignored.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(content)
            known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
            evaluations = {int(step): _with_nan(numbers) for step, numbers in known.get("evaluations", {}).items()}
            return cls(**known | {"metrics": _with_nan(known.get("metrics", {})), "evaluations": evaluations})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"it does not hold a run's progress ({error})") from error


def read_progress(run_path: str) -> RunProgress | None:
    """The progress of a run; None if it has not been written yet.

    Raises:
        ValueError: its file holds something else.
        OSError: the storage fails.
    """
    try:
        return RunProgress.from_json(read_bytes(join(run_path, PROGRESS_FILE)))
    except FileNotFoundError:
        return None


class ProgressTracker:
    """Passes all records on to another tracker, and keeps the run's progress in its folder.

    Args:
        inner: takes the records.
        run_path: the run's folder or address.
        begun: the run's name and its numbers of steps.
    """

    def __init__(self, inner: Tracker, run_path: str, begun: RunProgress) -> None:
        self._inner = inner
        known = _earlier(run_path) or begun
        self._progress = dataclasses.replace(
            begun, started=time.time(), step=known.step, metrics=known.metrics, evaluations=known.evaluations
        )
        self._writer = _Writer(run_path)
        self._writer.put(self._progress)

    def log_params(self, params: Mapping[str, Scalar]) -> None:
        """See `Tracker`."""
        self._inner.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`; an evaluation is known by the names of its metrics, ``val/...``."""
        self._inner.log_metrics(metrics, step)
        values = finite_or_not(metrics)
        if any(name.startswith("val/") for name in values):
            numbers = {name: value for name, value in values.items() if name.count("/") == 1}
            evaluations = dict(sorted({**self._progress.evaluations, step: numbers}.items()))
            self._put(dataclasses.replace(self._progress, evaluations=evaluations))
        else:
            self._put(dataclasses.replace(self._progress, step=step, metrics=values))

    def log_text(self, text: str, path: str) -> None:
        """See `Tracker`."""
        self._inner.log_text(text, path)

    def log_file(self, location: str | Path, artifact_dir: str) -> None:
        """See `Tracker`."""
        self._inner.log_file(location, artifact_dir)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `Tracker`."""
        self._inner.set_tags(tags)

    def sync(self) -> None:
        """See `Tracker`."""
        self._inner.sync()

    def finish(self, status: Status) -> None:
        """See `Tracker`; the file says how the run ended the first time."""
        self._put(dataclasses.replace(self._progress, status=_STATUS_OF[status]))
        self._writer.close()
        self._inner.finish(status)

    def _put(self, progress: RunProgress) -> None:
        self._progress = progress
        self._writer.put(progress)


class _Writer:
    """Writes the newest progress in a thread.

    Args:
        run_path: the run's folder or address.
    """

    def __init__(self, run_path: str) -> None:
        self._location = join(run_path, PROGRESS_FILE)
        self._pause_s = _EVERY_REMOTE_S if is_remote(run_path) else _EVERY_S
        self._latest: RunProgress | None = None
        self._news = threading.Event()
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._write_until_closed, name="run progress", daemon=True)
        self._thread.start()

    def put(self, progress: RunProgress) -> None:
        """Sets the progress to write next, replacing one that is not written yet."""
        self._latest = progress
        self._news.set()

    def close(self) -> None:
        """Writes the newest progress at once, and waits for that, with a time limit."""
        self._closing.set()
        self._news.set()
        self._thread.join(_LAST_WRITE_S)

    def _write_until_closed(self) -> None:
        while True:
            self._news.wait(BEAT_S)
            closing = self._closing.is_set()  # read first, so that everything that was put before closing is written
            self._news.clear()
            if self._latest is not None:
                self._write(self._latest)
            if closing:
                return
            self._closing.wait(self._pause_s)

    def _write(self, progress: RunProgress) -> None:
        try:
            content = dataclasses.replace(progress, written=time.time()).to_json()
            write_bytes(self._location, content, _BRIEFLY)
        except OSError as error:
            if not self._failing:
                reason = reason_of(error)
                logger.warning(
                    "%s cannot be written (%s); whoever watches the run sees old news", self._location, reason
                )
            self._failing = True
        else:
            self._failing = False


def _earlier(run_path: str) -> RunProgress | None:
    """The progress of the previous process; None if there was none, or the file cannot be read."""
    try:
        return read_progress(run_path)
    except (OSError, ValueError) as error:
        logger.info("the progress of %s up to now is not known: %s", run_path, error)
        return None


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _with_nan(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in numbers.items()}
