"""The thread that sends an event log to MLflow. It continues where the last sender stopped.

The log is complete; MLflow is a copy that may be behind. After an error the sender waits and tries again; the caller
that logs never sees the error. Metrics are sent first, files only when no metrics are left, so that a slow upload does
not delay metrics.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from detr_ray.credentials import without_credentials
from detr_ray.printable import shortened
from detr_ray.tracking.event_batch import EventBatch, FileGoneError, upload
from detr_ray.tracking.event_log import LOG_NAME, read_events
from detr_ray.tracking.mlflow_run import MlflowRun, RefusedError, RunGoneError, RunSettings
from detr_ray.tracking.sent_state import Pending, SentState
from detr_ray.tracking.store import public_uri

try:
    import fcntl
except ImportError:  # no file locks on this system: two senders at once send twice, which is harmless
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_LOCK_NAME = "sender.lock"
_URGENT_RETRY_S = 0.5
_SAY_EVERY_S = 5.0
_FAILURES_UNTIL_WARNING = 2  # an idle connection that was closed fails once
_FAILURES_UNTIL_SUSPICIOUS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Time limits of sending, in seconds.

    Attributes:
        batch_interval: how long events are collected before they are sent together.
        first_retry: pause after the first failure; each further failure doubles the pause.
        longest_retry: longest pause.
        finish: how long ``finish`` waits for unsent records.
    """

    batch_interval: float = 1.0
    first_retry: float = 1.0
    longest_retry: float = 60.0
    finish: float = 30.0

    def pause(self, failures: int) -> float:
        """The pause after this number of consecutive failures."""
        return min(self.first_retry * 2.0 ** min(failures - 1, 30), self.longest_retry)


@dataclass(slots=True)
class _FailedUpload:
    failures: int = 0
    retry_at: float = 0.0
    tried_at_end: bool = False


class Sender:
    """Sends the log of a folder to MLflow, in its own thread."""

    def __init__(self, folder: Path, settings: RunSettings, timing: Timing) -> None:
        self._folder, self._settings, self._timing = folder, settings, timing
        self._log_path = folder / LOG_NAME
        self._state = SentState.load(folder, f"{public_uri(settings.tracking_uri)} {settings.run_uid}")
        self._run: MlflowRun | None = None
        self._lock_file: IO[str] | None = None
        self._failures = 0
        self._last_error = ""
        self._failed_uploads: dict[str, _FailedUpload] = {}
        self._work = threading.Event()
        self._urgent = threading.Event()
        self._stop = threading.Event()
        self._progress = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-sender", daemon=True)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow was reached."""
        return self._state.run_id

    @property
    def last_error(self) -> str:
        """Why the last attempt failed; empty if it succeeded."""
        return self._last_error

    def start(self) -> None:
        """Starts the thread."""
        self._work.set()
        self._thread.start()

    def wake(self) -> None:
        """Signals the thread that the log has grown."""
        self._work.set()

    def pending(self) -> Pending:
        """What is not sent yet. Reads the unsent part of the log to count its lines."""
        events = sum(1 for _ in read_events(self._log_path, self._state.offset))
        return Pending(events, tuple(self._state.uploads), dict(self._state.left_out), self._folder)

    def drain(self, timeout_s: float, say: Callable[[Pending], None] | None = None) -> Pending:
        """Sends without pauses until everything is sent or the time is over, and stops the thread.

        Files that could not be stored before are tried once more; the call does not wait for further attempts.

        Args:
            timeout_s: how long to wait.
            say: called with what is left, every few seconds.
        """
        deadline = time.monotonic() + timeout_s
        said = time.monotonic()
        self._urgent.set()
        self._work.set()
        while not self._is_done() and self._thread.is_alive():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._progress.wait(min(left, 0.2))
            self._progress.clear()
            if say is not None and time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                say(self.pending())
        self._stop.set()
        self._work.set()
        self._thread.join(timeout=max(deadline - time.monotonic(), 0.1))
        return self.pending()

    def _is_done(self) -> bool:
        if next(read_events(self._log_path, self._state.offset), None) is not None:
            return False
        return all(self._failed_upload(target).tried_at_end for target in tuple(self._state.uploads))

    # The methods below run in the sender's thread.

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                self._work.wait(self._until_next_upload())
                self._work.clear()
                self._urgent.wait(self._timing.batch_interval)
                self._attempt()
                self._progress.set()
        finally:
            if self._lock_file is not None:
                self._lock_file.close()

    def _attempt(self) -> None:
        """Sends everything that is due. After a failure, notes it and waits."""
        try:
            if self._run is None:
                self._run = self._connect()
            while not self._stop.is_set() and (self._send_events(self._run) or self._send_upload(self._run)):
                self._recovered()
                self._progress.set()
            self._recovered()
        except Exception as error:  # any error of MLflow, its store or the disk; the log still has the unsent events
            self._run = None  # MLflow may have stored a part: connect again to see which
            self._failed(error)
            pause = self._timing.pause(self._failures)
            if self._urgent.is_set():
                self._stop.wait(min(pause, _URGENT_RETRY_S))
            else:
                self._urgent.wait(pause)
            self._work.set()

    def _connect(self) -> MlflowRun:
        self._take_lock()
        times = (line.event["t"] for line in read_events(self._log_path) if line.event)
        started_ms = next((t for t in times if type(t) is int), time.time_ns() // 1_000_000)
        run = MlflowRun.open(self._settings, self._state.run_id, started_ms)
        if run.run_id != self._state.run_id:
            self._state = SentState(self._state.destination, run.run_id)
            self._state.save(self._folder)
        return run

    def _take_lock(self) -> None:
        if self._lock_file is not None or fcntl is None:
            return
        lock_file = (self._folder / _LOCK_NAME).open("a")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock_file.close()
            raise RuntimeError(f"another process is sending what is in {self._folder}") from None
        except OSError:
            logger.debug("%s is on a file system without locks", self._folder)
        self._lock_file = lock_file

    def _send_events(self, run: MlflowRun) -> bool:
        """Sends the next events as one batch; False if there are none."""
        batch = EventBatch()
        for line in read_events(self._log_path, self._state.offset):
            if not batch.has_room_for(line):
                break
            batch.add(line)
        if batch.lines == 0:
            return False
        refused_before = run.refused
        run.suspicious = self._failures >= _FAILURES_UNTIL_SUSPICIOUS
        batch.send(run)
        state = self._state
        if batch.unreadable:
            state.left_out["unreadable lines"] += batch.unreadable
        if run.refused > refused_before:
            state.left_out["refused values"] += run.refused - refused_before
        for target, offset in batch.uploads.items():
            state.uploads[target] = offset
            self._failed_uploads.pop(target, None)
        state.offset = batch.end
        state.save(self._folder)
        return True

    def _send_upload(self, run: MlflowRun) -> bool:
        """Uploads the next text or file that is due; False if there is none."""
        target = self._next_upload()
        if target is None:
            return False
        try:
            upload(run, next(read_events(self._log_path, self._state.uploads[target]), None))
        except RefusedError as error:
            self._leave_out("refused files", target, error)
        except FileGoneError as error:
            self._leave_out("files gone", target, error)
        except RunGoneError:
            raise
        except Exception as error:
            run.check()  # raises if MLflow cannot be reached; otherwise only the artifact store failed
            self._postpone(target, error)
            return True
        self._failed_uploads.pop(target, None)
        del self._state.uploads[target]
        self._state.save(self._folder)
        return True

    def _next_upload(self) -> str | None:
        now, urgent = time.monotonic(), self._urgent.is_set()
        for target in self._state.uploads:
            failed = self._failed_upload(target)
            if not failed.tried_at_end and (urgent or failed.retry_at <= now):
                return target
        return None

    def _until_next_upload(self) -> float | None:
        if self._urgent.is_set() or not self._failed_uploads:
            return None
        return max(min(failed.retry_at for failed in self._failed_uploads.values()) - time.monotonic(), 0.0)

    def _failed_upload(self, target: str) -> _FailedUpload:
        return self._failed_uploads.get(target) or _FailedUpload()

    def _postpone(self, target: str, error: Exception) -> None:
        failed = self._failed_uploads.setdefault(target, _FailedUpload())
        failed.failures += 1
        failed.retry_at = time.monotonic() + self._timing.pause(failed.failures)
        failed.tried_at_end = self._urgent.is_set()
        if failed.failures == 1:
            logger.warning("artifact %r could not be stored and will be tried again (%s)", target, error_text(error))

    def _leave_out(self, reason: str, target: str, error: Exception) -> None:
        self._state.left_out[reason] += 1
        logger.warning(
            "artifact %r is left out: %s (%s so far: %d)", target, error, reason, self._state.left_out[reason]
        )

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._last_error = error_text(error)
        if self._failures == _FAILURES_UNTIL_WARNING:
            message = "MLflow at %s does not accept records (%s); they are kept in %s and sent when it does"
            logger.warning(message, public_uri(self._settings.tracking_uri), self._last_error, self._folder)

    def _recovered(self) -> None:
        if self._failures >= _FAILURES_UNTIL_WARNING:
            logger.warning("MLflow at %s accepts records again", public_uri(self._settings.tracking_uri))
        self._failures = 0
        self._last_error = ""


def error_text(error: Exception) -> str:
    """An error on one line, without passwords: the operating system's error if MLflow wrapped one."""
    cause = _root_cause(error)
    first_line = (str(cause).splitlines() or [""])[0]
    return shortened(without_credentials(f"{type(cause).__name__}: {first_line}"), 300)


def _root_cause(error: BaseException) -> BaseException:
    """The operating system's error if there is one: MLflow wraps "connection refused" in four other errors."""
    cause, deeper = error, _cause(error)
    while deeper is not None:
        if isinstance(deeper, OSError):
            cause = deeper
        deeper = _cause(deeper)
    return cause


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ if error.__suppress_context__ else error.__context__
