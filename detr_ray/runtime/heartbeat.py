"""Heartbeats: a thread in each worker and in Ray Train's controller that sends its state to the job's status.

A heartbeat that does not arrive does no harm: the next one has the complete state again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from detr_ray.engine.hooks import Evaluated
from detr_ray.runtime.job_status import MOST_LINES, ControllerStatus, Lines, Member, WorkerStatus, packed
from detr_ray.runtime.ray_internals import node_is_taken_away

if TYPE_CHECKING:
    from detr_ray.engine.context import LeaveReason, Phase

logger = logging.getLogger(__name__)

# Groups of hundreds of workers send more slowly, so that the status receives only a few hundred a second.
BEAT_S = 1.0

# Fewer evaluations than this end between two queries of the driver.
MOST_EVALUATED = 16
BEATS_PER_S = 200
LEAST_PAUSE_S = 0.2
ANSWER_WITHIN_S = 10.0

# After this time without the job's status, a worker has lost its driver: a living driver replaces a status that does
# not answer within half a minute.
ORPHANED_S = 120.0


class AwakeClock:
    """Seconds since the last reset in which this process could run.

    Time in which the process was stopped (SIGSTOP, a suspended machine) does not count.

    Args:
        most_s: the time between two readings counts at most this much.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self.reset()

    def reset(self) -> None:
        """Sets it to zero."""
        self._seconds, self._looked = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Reads the clock."""
        now = time.monotonic()
        self._seconds += min(now - self._looked, self._most_s)
        self._looked = now
        return self._seconds


class _Heartbeat:
    """A thread that calls `_send` regularly, and at once when there is something new.

    Args:
        pause_s: seconds between two heartbeats.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._source = uuid.uuid4().hex
        self._lines: list[str] = []
        self._first_line = 0
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._flushed: list[threading.Event] = []
        self._unheard = AwakeClock(pause_s + ANSWER_WITHIN_S + 5)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def say(self, line: str) -> None:
        """Sends a line of progress to the driver with a heartbeat at once."""
        with self._lock:
            if len(self._lines) < MOST_LINES:
                self._lines.append(line)
        self._woken.set()

    def flush(self) -> None:
        """Waits until everything so far has been received, with a time limit."""
        done = threading.Event()
        with self._lock:
            self._flushed.append(done)
        self._woken.set()
        done.wait(ANSWER_WITHIN_S)

    def _run(self) -> None:
        while True:
            self._woken.wait(self._pause_s)
            self._woken.clear()
            with self._lock:
                lines = Lines(self._source, self._first_line, tuple(self._lines))
                flushed = len(self._flushed)
            try:
                self._send(lines)
            except ray.exceptions.RayError as error:
                logger.info("the job's status is not reached: %s", error)
                self._missed(self._unheard.seconds())
            else:
                self._unheard.reset()
                with self._lock:
                    del self._lines[: len(lines.texts)]
                    self._first_line = lines.end
                    arrived, self._flushed = self._flushed[:flushed], self._flushed[flushed:]
                for event in arrived:
                    event.set()
            time.sleep(LEAST_PAUSE_S)

    def _send(self, lines: Lines) -> None:
        raise NotImplementedError

    def _missed(self, unheard_s: float) -> None:
        """Called when a heartbeat has not been answered."""


class WorkerHeartbeat(_Heartbeat):
    """A worker's heartbeat: sends what it does, and receives the reason to leave. It runs until the process ends.

    Args:
        status: keeps the job's status.
        attempt: the start of Ray Train that the worker belongs to.
        rank: this worker.
        world_size: workers in the group.
    """

    def __init__(self, status: ActorHandle, attempt: int, rank: int, world_size: int) -> None:
        super().__init__(max(BEAT_S, world_size / BEATS_PER_S))
        self._status = status
        self._self = (attempt, rank, world_size, ray.util.get_node_ip_address(), os.getpid())
        self._doing: tuple[Phase, int, float] = ("starting", 0, time.monotonic())
        self._task, self._waits = 0, False
        self._evaluated: deque[Evaluated] = deque(maxlen=MOST_EVALUATED)
        self._outcome: bytes | None = None
        self.leave_reason: LeaveReason | None = None
        self._thread.start()

    def begin(self, task: int) -> None:
        """Notes that the worker begins a job. Reasons to leave the previous job no longer count."""
        with self._lock:
            self._task, self._waits, self._outcome, self.leave_reason = task, False, None, None
            self._evaluated.clear()
            self._doing = ("starting", 0, time.monotonic())

    def wait(self) -> None:
        """Notes that the worker has finished its job. A reason to leave that job is no reason to end."""
        with self._lock:
            self._waits, self.leave_reason = True, None

    def end(self, outcome: bytes) -> None:
        """Sends the job's outcome to the driver with a heartbeat at once."""
        with self._lock:
            self._outcome = outcome
        self._woken.set()

    def report(self, evaluated: Evaluated) -> None:
        """Sends an evaluation to the driver with a heartbeat at once."""
        self._evaluated.append(evaluated)
        self._woken.set()

    def enter(self, phase: Phase, step: int) -> None:
        """Notes what the worker does from now on."""
        self._doing = (phase, step, time.monotonic())

    def _send(self, lines: Lines) -> None:
        phase, step, since = self._doing
        with self._lock:
            about = self._task, self._waits
            own: dict[str, Any] = {"task": self._task, "evaluated": tuple(self._evaluated), "outcome": self._outcome}
        doing = WorkerStatus(*self._self, phase, step, time.monotonic() - since, **own)
        asked: LeaveReason | None = ray.get(self._status.worker_beat.remote(doing, lines), timeout=ANSWER_WITHIN_S)
        with self._lock:
            if (self._task, self._waits) == about:  # otherwise the answer is about an earlier state
                self.leave_reason = asked or ("preempted" if node_is_taken_away() else None)

    def _missed(self, unheard_s: float) -> None:
        if unheard_s > ORPHANED_S:
            self.leave_reason = "asked"
        elif self.leave_reason is None and node_is_taken_away():
            self.leave_reason = "preempted"


class ControllerHeartbeat(_Heartbeat):
    """The controller's heartbeat: sends its state and its workers; the answer tells whether the workers have left.

    Args:
        status: keeps the job's status.
        attempt: number of the start of Ray Train.
    """

    def __init__(self, status: ActorHandle, attempt: int) -> None:
        super().__init__(BEAT_S)
        self._status = status
        self._attempt = attempt
        now = time.monotonic()
        self._state, self._state_since, self._workers_since, self._looped = "INITIALIZING", now, now, now
        self._failures: tuple[str, ...] = ()
        self._group, self._group_since = 0, now
        self._members: dict[int, Member] = {}
        self._known_group = -1
        self._leave: LeaveReason | None = None
        self.everyone_left = False
        self._thread.start()

    def enter(self, state: str, failure: str) -> None:
        """Notes the new state of the controller, and a failure, if there was one."""
        now = time.monotonic()
        with self._lock:
            before = self._current(now).running
            if state != self._state:
                self._state, self._state_since = state, now
                self._woken.set()
            self._looped = now
            if self._current(now).running != before:
                self._workers_since = now
            if failure:
                self._failures = (*self._failures, failure)

    def begin_group(self, workers: dict[int, tuple[str, int, ActorHandle]]) -> None:
        """Notes a new group of workers: rank -> address of the node, id of the process, handle."""
        members = {rank: Member(node, process, packed(actor)) for rank, (node, process, actor) in workers.items()}
        with self._lock:
            self._members, self._group, self._group_since = members, self._group + 1, time.monotonic()
        self._woken.set()

    def ask_to_leave(self, reason: LeaveReason | None) -> None:
        """Asks the workers to leave, or withdraws that."""
        with self._lock:
            self._leave, self.everyone_left = reason, False
        self._woken.set()

    def _current(self, now: float) -> ControllerStatus:
        return ControllerStatus(
            self._attempt, os.getpid(), self._state, now - self._state_since, now - self._workers_since,
            now - self._looped, self._failures, self._group, now - self._group_since, self._leave,
        )  # fmt: skip

    def _send(self, lines: Lines) -> None:
        with self._lock:
            current = self._current(time.monotonic())
            members = None if self._known_group == self._group else self._members
        answer: Any = self._status.controller_beat.remote(current, members, lines)
        self._known_group, left = ray.get(answer, timeout=ANSWER_WITHIN_S)
        if current.leave is not None:
            self.everyone_left = left
