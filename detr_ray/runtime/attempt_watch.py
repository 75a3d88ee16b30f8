"""What the driver has seen during one start of Ray Train, in addition to its last status, and for how long."""

from __future__ import annotations

from detr_ray.config import TrainConfig
from detr_ray.engine.context import Phase
from detr_ray.engine.reporting.progress import duration
from detr_ray.runtime.heartbeat import AwakeClock
from detr_ray.runtime.job_status import Snapshot, WorkerStatus
from detr_ray.runtime.stalls import STARTING_S, hanging_controller, hanging_workers

# The job's status answers in milliseconds. A single missed answer may only mean that this process was stopped.
ANSWER_WITHIN_S = 5.0

# The controller checks its workers twice a second; after this time it must have noticed that one has ended.
NOTICED_WITHIN_S = 60.0

WAITING_NOTE_S = 30.0


class AttemptWatch:
    """What is known of one start of Ray Train (an attempt) in addition to its last status.

    Args:
        limits: time limits.
        attempt: number of the attempt.

    Attributes:
        has_heard_controller: whether there has been a heartbeat of its controller.
    """

    def __init__(self, limits: TrainConfig, attempt: int) -> None:
        self.attempt = attempt
        self._limits = limits
        self._num_failures_seen = 0
        self._controller_unheard = AwakeClock(2 * ANSWER_WITHIN_S)
        self.has_heard_controller = False
        self._noted_s = 0.0
        self._placed_at_s: float | None = None
        self._suspects: set[tuple[int, int, Phase, int]] = set()
        self._after_end = AwakeClock(2 * ANSWER_WITHIN_S)
        self._ended: tuple[int, str] | None = None

    def resume(self) -> None:
        """Restarts the clocks before watching. Between two jobs nothing was watched."""
        self._controller_unheard.reset()
        self._suspects = set()
        self._after_end.reset()

    def new_failures(self, snapshot: Snapshot) -> tuple[str, ...]:
        """The failures that were not seen yet."""
        if snapshot.controller is None:
            return ()
        new = snapshot.controller.failures[self._num_failures_seen :]
        self._num_failures_seen += len(new)
        return new

    def controller_fault(self, snapshot: Snapshot, leaving: bool) -> str | None:
        """Why the controller must be ended; None if it works.

        Args:
            snapshot: the job's status.
            leaving: whether the user has asked to stop.
        """
        controller, limit_s = snapshot.controller, float(self._limits.stall_timeout_s)
        if leaving:
            limit_s = min(limit_s, NOTICED_WITHIN_S)
        if controller is None:
            unheard_s = self._controller_unheard.seconds()
            if unheard_s <= max(limit_s, STARTING_S):
                return None
            return f"the controller hangs: nothing heard of it for {duration(unheard_s)}"
        self._controller_unheard.reset()
        self.has_heard_controller = True
        found = hanging_controller(controller, limit_s)
        if found is not None:
            return f"the controller hangs: {found} (process {controller.process})"
        if self._ended is not None and (self._ended[0] != controller.group or not controller.running):
            self._ended = None
        if self._ended is not None and self._after_end.seconds() > NOTICED_WITHIN_S:
            return f"the controller hangs: it takes no notice that {self._ended[1]} was ended"
        return None

    def hanging_workers(self, snapshot: Snapshot) -> list[WorkerStatus]:
        """The workers that must be ended: those found hanging twice in a row."""
        controller, limit_s = snapshot.controller, float(self._limits.stall_timeout_s)
        # After some workers were ended, the others wait until Ray Train ends them as well.
        waits = self._ended is not None
        # A worker may wait for a controller whose hanging has not been noticed yet.
        if waits or controller is None or controller.silent_s > limit_s / 2:
            self._suspects = set()
            return []
        found = hanging_workers(snapshot.workers, limit_s)
        suspects = {(worker.rank, worker.process, worker.phase, worker.step) for worker in found}
        confirmed, self._suspects = suspects & self._suspects, suspects
        return [w for w in found if (w.rank, w.process, w.phase, w.step) in confirmed]

    def ended(self, workers: list[WorkerStatus], snapshot: Snapshot) -> None:
        """Notes that workers were ended: Ray Train will start another group."""
        assert snapshot.controller is not None, "no worker is ended without a controller"
        ranks = " and ".join(f"rank {worker.rank}" for worker in workers)
        self._ended = snapshot.controller.group, ranks
        self._after_end.reset()

    def waited_s(self, snapshot: Snapshot) -> float:
        """Seconds without workers."""
        if snapshot.controller is None:
            return self._controller_unheard.seconds()
        return snapshot.controller.workers_s

    def note_due(self, seconds: float) -> bool:
        """Whether it is time to tell the user that there are still no workers."""
        if seconds < self._noted_s:
            self._noted_s, self._placed_at_s = 0.0, None
        if seconds <= self._noted_s + WAITING_NOTE_S:
            return False
        self._noted_s = seconds
        return True

    def placed_s(self, seconds: float, placed: bool) -> float:
        """Seconds since places were reserved for workers that do not run yet."""
        if not placed:
            self._placed_at_s = None
            return 0.0
        if self._placed_at_s is None:
            self._placed_at_s = seconds
        return seconds - self._placed_at_s
