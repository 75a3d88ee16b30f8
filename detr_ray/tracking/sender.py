"""The thread that brings an event log to MLflow, from where the last sender stopped.

The log is the truth, MLflow is a copy that may lag: how far it has come is kept beside the log (``sent.json``), after
each batch that was taken. Whatever goes wrong with MLflow is waited out here and never reaches the one who logs.
Metrics go first; files wait until no metrics do, so that a slow upload holds nothing up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from detr_ray.tracking.event_log import LOG_NAME, LoggedEvent, read_events
from detr_ray.tracking.mlflow_run import MlflowRun, RefusedError, RunGoneError, RunSettings, write_whole
from detr_ray.tracking.naming import clean_names, shortened
from detr_ray.tracking.store import public_uri

try:
    import fcntl
except ImportError:  # no file locks on this system: two senders at once only send twice, which does no harm
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

STATE_NAME = "sent.json"
_LOCK_NAME = "sender.lock"
_EVENTS_AT_ONCE = 500
_URGENT_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Timing:
    """Time limits of sending, in seconds.

    Attributes:
        batch_interval: how long events are gathered before they are sent together.
        first_retry: pause after the first failure; each further one doubles it.
        longest_retry: where the pauses stop growing.
        finish: how long ``finish`` waits for what was not sent.
    """

    batch_interval: float = 1.0
    first_retry: float = 1.0
    longest_retry: float = 60.0
    finish: float = 30.0

    def pause(self, failures: int) -> float:
        """The pause after so many failures in a row."""
        return min(self.first_retry * 2.0 ** min(failures - 1, 30), self.longest_retry)


@dataclass(frozen=True, slots=True)
class Pending:
    """What was logged and has not reached MLflow.

    Attributes:
        events: lines of the log not sent.
        uploads: texts and files not stored, as their paths among the artifacts.
        left_out: files that were gone, values and files that MLflow refuses, unreadable lines: counted by reason.
            They are not waited for.
        folder: where all of it is kept.
    """

    events: int
    uploads: tuple[str, ...]
    left_out: dict[str, int]
    folder: Path

    def __bool__(self) -> bool:
        return self.events > 0 or bool(self.uploads)

    def __str__(self) -> str:
        return (
            f"{self.events} events and {len(self.uploads)} files are not in MLflow yet; they are kept in {self.folder}"
        )


@dataclass(slots=True)
class SentState:
    """How far a store has the log; kept on disk.

    Attributes:
        destination: store and run that this is about.
        run_id: MLflow's id of the run, once it is known.
        offset: the log's bytes before it are in MLflow, but for ``uploads``.
        uploads: target -> offset of the event that says what belongs there.
        left_out: counts by reason of what never arrives.
    """

    destination: str
    run_id: str | None = None
    offset: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, destination: str) -> SentState:
        """The kept state; a fresh one where there is none, or it is of another destination or another log."""
        try:
            content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
            state = cls(**content)
        except (FileNotFoundError, TypeError, ValueError):
            return cls(destination)
        log = folder / LOG_NAME
        fits = state.destination == destination and log.exists() and state.offset <= log.stat().st_size
        return state if fits else cls(destination)

    def save(self, folder: Path) -> None:
        """Replaces the kept state."""
        content = {name: getattr(self, name) for name in self.__slots__}
        write_whole(folder / STATE_NAME, json.dumps(content))


class Sender:
    """Sends a folder's log to MLflow from a thread of its own."""

    def __init__(self, folder: Path, settings: RunSettings, timing: Timing) -> None:
        self._folder, self._settings, self._timing = folder, settings, timing
        self._log_path = folder / LOG_NAME
        self._state = SentState.load(folder, f"{public_uri(settings.tracking_uri)} {settings.run_uid}")
        self._run: MlflowRun | None = None
        self._lock_file: IO[str] | None = None
        self._failures = 0
        self._last_error = ""
        self._upload_failures: dict[str, int] = {}
        self._upload_after: dict[str, float] = {}
        self._tried_last: set[str] = set()
        self._work = threading.Event()
        self._urgent = threading.Event()
        self._stop = threading.Event()
        self._progress = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-sender", daemon=True)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while MLflow was never reached."""
        return self._state.run_id

    @property
    def last_error(self) -> str:
        """Why the last attempt failed; empty after one that did not."""
        return self._last_error

    def start(self) -> None:
        """Starts the thread."""
        self._work.set()
        self._thread.start()

    def wake(self) -> None:
        """Says that the log has grown."""
        self._work.set()

    def pending(self) -> Pending:
        """What is not sent; counts the lines of the log that are left."""
        events = sum(1 for _ in read_events(self._log_path, self._state.offset))
        return Pending(events, tuple(self._state.uploads), dict(self._state.left_out), self._folder)

    def drain(self, timeout_s: float) -> Pending:
        """Sends without pauses until all is sent or the time is over, and stops the thread."""
        deadline = time.monotonic() + timeout_s
        self._urgent.set()
        self._work.set()
        while not self._is_done() and self._thread.is_alive():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._progress.wait(min(left, 0.2))
            self._progress.clear()
        self._stop.set()
        self._work.set()
        self._thread.join(timeout=max(deadline - time.monotonic(), 0.1))
        return self.pending()

    def _is_done(self) -> bool:
        everything_tried = set(self._state.uploads) <= self._tried_last
        return everything_tried and next(read_events(self._log_path, self._state.offset), None) is None

    # From here on: the sender's thread.

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
        try:
            if self._run is None:
                self._run = self._connect()
            while not self._stop.is_set() and (self._send_events(self._run) or self._send_upload(self._run)):
                self._recovered()
                self._progress.set()
            self._recovered()
        except RunGoneError as error:
            logger.warning("%s", error)
            self._run = None
            self._work.set()
        except Exception as error:  # whatever MLflow, its store or the disk raises is waited out
            self._failed(error)
            pause = self._timing.pause(self._failures)
            if not self._urgent.is_set():
                self._urgent.wait(pause)
            else:
                self._stop.wait(min(pause, _URGENT_RETRY_S))
            self._work.set()

    def _connect(self) -> MlflowRun:
        self._take_lock()
        first = next((line.event for line in read_events(self._log_path) if line.event), None)
        run = MlflowRun.open(self._settings, self._state.run_id, first["t"] if first else time.time_ns() // 1_000_000)
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
        except BlockingIOError as error:
            lock_file.close()
            raise RuntimeError(f"another process sends what is in {self._folder}") from error
        except OSError:
            logger.debug("%s is on a file system without locks", self._folder)
        self._lock_file = lock_file

    def _send_events(self, run: MlflowRun) -> bool:
        """Sends the next events as one batch; False where there are none."""
        batch = _Batch()
        for line in read_events(self._log_path, self._state.offset):
            if not batch.takes(line):
                break
            batch.add(line)
        if not batch.lines:
            return False
        refused_before = run.refused
        batch.send(run)
        for reason, count in (("unreadable lines", batch.unreadable), ("refused", run.refused - refused_before)):
            if count:
                self._state.left_out[reason] = self._state.left_out.get(reason, 0) + count
        for target, offset in batch.uploads.items():
            self._state.uploads[target] = offset
            self._upload_failures.pop(target, None)
            self._upload_after.pop(target, None)
        self._state.offset = batch.end
        self._state.save(self._folder)
        return True

    def _send_upload(self, run: MlflowRun) -> bool:
        """Stores the next text or file whose time has come; False where there is none."""
        target = self._next_upload()
        if target is None:
            return False
        if self._urgent.is_set():
            self._tried_last.add(target)
        line = next(read_events(self._log_path, self._state.uploads[target]), None)
        try:
            _upload(run, line.event if line is not None else None)
        except RefusedError as error:
            self._leave_out("refused files", target, str(error))
        except FileNotFoundError as error:
            self._leave_out("files gone", target, str(error))
        except RunGoneError:
            raise
        except Exception as error:
            run.check()  # raises where it is MLflow that is away; else the artifacts' store is in trouble
            failures = self._upload_failures[target] = self._upload_failures.get(target, 0) + 1
            self._upload_after[target] = time.monotonic() + self._timing.pause(failures)
            if failures == 1:
                logger.warning("artifact %r could not be stored, will be tried again: %s", target, self._told(error))
            return True
        self._state.uploads.pop(target, None)
        self._state.save(self._folder)
        return True

    def _next_upload(self) -> str | None:
        if self._urgent.is_set():
            return next((target for target in self._state.uploads if target not in self._tried_last), None)
        now = time.monotonic()
        return next((target for target in self._state.uploads if self._upload_after.get(target, 0.0) <= now), None)

    def _until_next_upload(self) -> float | None:
        if self._urgent.is_set() or not self._upload_after:
            return None
        return max(min(self._upload_after.values()) - time.monotonic(), 0.0)

    def _leave_out(self, reason: str, target: str, explanation: str) -> None:
        count = self._state.left_out[reason] = self._state.left_out.get(reason, 0) + 1
        logger.warning("artifact %r is left out (%s): %s (%d so far)", target, reason, explanation, count)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._last_error = self._told(error)
        if self._failures == 1:
            uri = public_uri(self._settings.tracking_uri)
            message = "MLflow at %s does not take what is logged (%s); it is kept in %s and sent when that is over"
            logger.warning(message, uri, self._last_error, self._folder)

    def _recovered(self) -> None:
        if self._failures:
            logger.warning("MLflow at %s takes what is logged again", public_uri(self._settings.tracking_uri))
        self._failures = 0
        self._last_error = ""

    def _told(self, error: Exception) -> str:
        first_line = (str(error).splitlines() or [""])[0]
        told = f"{type(error).__name__}: {first_line}"
        return shortened(told.replace(self._settings.tracking_uri, public_uri(self._settings.tracking_uri)), 300)


class _Batch:
    """Events in a row that can be sent together: values of any kind, or one change of the run's status."""

    def __init__(self) -> None:
        self.lines = 0
        self.end = 0
        self.unreadable = 0
        self.uploads: dict[str, int] = {}
        self._metrics: list[tuple[str, float, int, int]] = []
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._set_status: Callable[[MlflowRun], None] | None = None

    def takes(self, line: LoggedEvent) -> bool:
        """Whether this line may still join: not after a change of status, nor may one join others."""
        changes_status = line.event is not None and line.event["kind"] in ("start", "finish")
        return self.lines == 0 or (self._set_status is None and not changes_status and self.lines < _EVENTS_AT_ONCE)

    def add(self, line: LoggedEvent) -> None:
        """Takes a line in; one that cannot be understood is counted."""
        self.lines += 1
        self.end = line.end
        try:
            self._add_event(line)
        except (KeyError, TypeError, ValueError, AttributeError):
            self.unreadable += 1

    def send(self, run: MlflowRun) -> None:
        """Sends all that was taken in."""
        run.log_params(self._params)
        run.set_tags(self._tags)
        run.log_metrics(self._metrics)
        if self._set_status is not None:
            self._set_status(run)

    def _add_event(self, line: LoggedEvent) -> None:
        if line.event is None:
            raise ValueError("torn line")
        event = line.event
        time_ms = int(event["t"])
        match event["kind"]:
            case "metrics":
                names = clean_names(event["metrics"])
                step = int(event["step"])
                values = event["metrics"].items()
                self._metrics += [(names[name], float(value), time_ms, step) for name, value in values]
            case "params":
                names = clean_names(event["params"])
                for name, value in event["params"].items():
                    self._params.setdefault(names[name], str(value))
            case "tags":
                names = clean_names(event["tags"])
                self._tags |= {names[name]: str(value) for name, value in event["tags"].items()}
            case "text" | "file":
                self.uploads[event["target"]] = line.start
            case "start":
                self._set_status = MlflowRun.set_running
            case "finish":
                status = str(event["status"])
                self._set_status = lambda run: run.set_ended(status, time_ms)
            case _:
                raise ValueError(f"unknown kind of event {event['kind']!r}")


def _upload(run: MlflowRun, event: dict[str, Any] | None) -> None:
    """Stores what an event says.

    Raises:
        FileNotFoundError: The file, the folder or the event is not there any more.
    """
    if event is None:
        raise FileNotFoundError("the log has no such event any more")
    if event["kind"] == "text":
        run.upload_text(event["text"], event["target"])
        return
    path = Path(event["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone")
    try:
        run.upload(path, event["dir"])
    except OSError:
        if not path.exists():
            raise FileNotFoundError(f"{path} went while it was stored") from None
        raise
    except Exception:
        raise
