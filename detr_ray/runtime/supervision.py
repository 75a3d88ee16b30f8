"""The driver's supervision of a job: shows progress, passes on requests to stop, ends hanging processes.

If any single process hangs, the job goes on. A status actor that does not answer is replaced. A controller without
heartbeats is ended, and the trainer is started again. Workers are checked only if the controller works, because a
worker may seem to hang while it waits for the controller. Ray's own servers are not supervised: Ray detects their loss
itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray

from detr_ray.callbacks import Say
from detr_ray.config import ConfigError, TrainConfig
from detr_ray.engine.context import LeaveReason
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import JobHooks
from detr_ray.engine.reporting.progress import duration
from detr_ray.runtime.attempt_watch import ANSWER_WITHIN_S, AttemptWatch
from detr_ray.runtime.heartbeat import AwakeClock
from detr_ray.runtime.host_process import StopSignals
from detr_ray.runtime.job_status import Member, Snapshot, Task, open_job_status, unpacked
from detr_ray.runtime.stalls import STARTING_S, describe, places
from detr_ray.runtime.trainer import Attempt

logger = logging.getLogger(__name__)

POLL_S = 0.5
EARLIER_JOB_ENDS_S = 20.0

SILENT_S = 12.0
UNANSWERED_S = 600.0


class StatusKeeper:
    """The driver's access to the job's status.

    Args:
        run_path: see `open_job_status`.
        say: shows the user a line.

    Raises:
        ConfigError: another job on this cluster writes the run.
    """

    def __init__(self, run_path: str | None, say: Say) -> None:
        self._say = say
        self._seen = ("", 0)
        self._silence = AwakeClock(2 * ANSWER_WITHIN_S)
        self._unanswered = AwakeClock(2 * ANSWER_WITHIN_S)
        self._patience_s = STARTING_S
        give_up = time.monotonic() + EARLIER_JOB_ENDS_S
        while True:
            try:
                self.actor = open_job_status(run_path)
                return
            except ValueError:
                if time.monotonic() > give_up:
                    raise ConfigError(
                        f"run.name: another job on this cluster is writing {run_path}; wait for it, stop it, or choose "
                        "another run.name"
                    ) from None
                time.sleep(1)

    def ask(self, attempt: int, task: Task | None, leave: LeaveReason | None) -> Snapshot | None:
        """Queries the job's status; None if it does not answer. The arguments are those of `JobStatus.ask`.

        Raises:
            RunFailed: it has not answered for too long.
        """
        try:
            asked = self.actor.ask.remote(attempt, task, leave, self._seen)
            snapshot: Snapshot = ray.get(asked, timeout=ANSWER_WITHIN_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            logger.info("the job's status does not answer: %s", error)
        else:
            self._seen = snapshot.lines.source, snapshot.lines.end
            self._silence.reset()
            self._unanswered.reset()
            self._patience_s = SILENT_S
            return snapshot
        if self._unanswered.seconds() > UNANSWERED_S:
            raise RunFailed(f"the job's status has not answered for {duration(UNANSWERED_S)}; Ray itself hangs")
        if self._silence.seconds() > self._patience_s:
            self._say("the process that keeps the job's status does not answer; it is started anew")
            ray.kill(self.actor, no_restart=False)
            self._silence.reset()
            self._patience_s = STARTING_S
        return None

    def members(self) -> dict[int, Member]:
        """The workers with their handles; none if the status does not answer."""
        try:
            found: dict[int, Member] = ray.get(self.actor.members.remote(), timeout=ANSWER_WITHIN_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            logger.info("the job's status does not answer: %s", error)
            return {}
        return found

    def end(self) -> None:
        """Ends the actor, so that its name is free for the next job of the run."""
        ray.kill(self.actor, no_restart=True)


class Supervisor:
    """Supervises workers from the driver, while they do one job after another.

    Args:
        status: their status.
        limits: the ``train`` section, for its time limits.
        missing: a text about the resources that the workers need, and those of the cluster.
        say: shows the user a line.

    Attributes:
        outcome: the present job's outcome, pickled, if its workers wait for another job; None before.
        num_failures: how often the workers were restarted after a failure.
        stalls: the workers that were ended because they were hanging.
    """

    def __init__(
        self,
        status: StatusKeeper,
        limits: TrainConfig,
        missing: Callable[[], str],
        say: Say,
    ) -> None:
        self._status = status
        self._limits = limits
        self._missing = missing
        self._task: Task | None = None
        self._signals = StopSignals()
        self._hooks = JobHooks()
        self._evaluated: set[int] = set()
        self._say = say
        self._told_to_leave = False
        self._abandoned = False
        self._processes: set[tuple[str, int]] = set()
        self._watch: AttemptWatch | None = None
        self.outcome: bytes | None = None
        self.num_failures = 0
        self.stalls: list[str] = []

    def begin(self, task: Task, signals: StopSignals, hooks: JobHooks) -> None:
        """Gives the workers a job.

        Args:
            task: the job; its number is higher than the previous one's.
            signals: say whether it is to stop.
            hooks: the hooks of the program that runs it.
        """
        self._task, self._signals, self._hooks = task, signals, hooks
        self._evaluated, self.outcome = set(), None
        self._told_to_leave = self._abandoned = False

    def watch(self, attempt: Attempt, number: int) -> str | None:
        """Watches until an attempt has ended, or its workers have finished the job and wait for another one
        (`outcome`).

        Args:
            attempt: one start of Ray Train.
            number: its number, higher than that of earlier ones.

        Returns:
            Why its controller had to be ended; None if the attempt ended by itself, or continues.

        Raises:
            KeyboardInterrupt: stopped by a signal, and there is no worker that could write a checkpoint.
            StoppedBeforeWork: the same, stopped by the program that runs the job.
            RunFailed: the workers' resources were not available in time.
        """
        if self._watch is None or self._watch.attempt != number:
            self._watch = AttemptWatch(self._limits, number)
        watch = self._watch
        watch.resume()
        while not attempt.wait(POLL_S):
            snapshot = self._ask(watch)
            if snapshot is None:
                continue
            if self.outcome is not None:
                self._task = None  # workers that are started again have no job
                self._ask(watch)
                return None
            self._abandoned = self._abandoned or self._hooks.should_abandon()
            if self._signals.asked() or self._abandoned:
                self._stop(watch, snapshot)
            fault = watch.controller_fault(snapshot, self._told_to_leave)
            if fault is None and snapshot.running:
                self._show_places(snapshot)
                self._end_hanging_workers(watch, snapshot)
            elif fault is None:
                fault = self._wait_for_workers(watch, attempt, snapshot)
            if fault is not None:
                attempt.end(self._status.members().values())
                self._ask(watch)
                return fault
        self._ask(watch)
        return None

    def count_failure(self, failure: str) -> bool:
        """Reports a failure; returns whether the workers are restarted, or there were too many failures."""
        self.num_failures += 1
        limit = self._limits.max_failures
        if 0 <= limit < self.num_failures:
            return False
        of = "" if limit < 0 else f" of at most {limit}"
        self._say(f"{failure}; starting the workers again (restart {self.num_failures}{of})")
        return True

    @property
    def max_failures(self) -> int:
        """Allowed number of failures; -1 for any number."""
        return self._limits.max_failures

    @property
    def failures_left(self) -> int:
        """Allowed number of further failures; -1 for any number."""
        limit = self._limits.max_failures
        return limit if limit < 0 else max(0, limit - self.num_failures)

    def _ask(self, watch: AttemptWatch) -> Snapshot | None:
        leave: LeaveReason | None = "abandoned" if self._abandoned else "asked" if self._told_to_leave else None
        snapshot = self._status.ask(watch.attempt, self._task, leave)
        if snapshot is None:
            return None
        for line in snapshot.lines.texts:
            self._say(line)
        if self._task is not None and snapshot.task == self._task.number:
            self._tell(snapshot)
        for failure in watch.new_failures(snapshot):
            self.count_failure(failure)
        return snapshot

    def _tell(self, snapshot: Snapshot) -> None:
        """Passes evaluations and steps of the job to the program's hooks."""
        for evaluated in snapshot.evaluated:
            if evaluated.step not in self._evaluated:
                self._evaluated.add(evaluated.step)
                self._hooks.on_evaluation(evaluated)
        if 0 in snapshot.workers:
            self._hooks.on_step(snapshot.workers[0].step)
        self.outcome = snapshot.outcome

    def _show_places(self, snapshot: Snapshot) -> None:
        """Shows once for each group of workers on which nodes they are."""
        workers = snapshot.workers
        processes = {(worker.node, worker.process) for worker in workers.values() if worker.heard}
        if workers and len(processes) == next(iter(workers.values())).world_size and processes != self._processes:
            self._processes = processes
            self._say(f"at work: {places(workers)}")

    def _stop(self, watch: AttemptWatch, snapshot: Snapshot) -> None:
        begun = any(worker.heard for worker in snapshot.workers.values())
        # A restarted status actor has no heartbeats yet.
        unknown = snapshot.controller is None and watch.has_heard_controller
        leaving = snapshot.running and self._told_to_leave
        if not begun and not unknown and not leaving:
            self._say("stopped before the workers had begun")
            self._signals.interrupt()
        if not self._told_to_leave:
            self._told_to_leave = True
            if not self._abandoned:
                self._say("stopping after this step, with a checkpoint (again: at once, without)")

    def _end_hanging_workers(self, watch: AttemptWatch, snapshot: Snapshot) -> None:
        workers = snapshot.workers
        found = watch.hanging_workers(snapshot)
        if not found:
            return
        members = self._status.members()
        for worker in found:
            stall = (
                f"rank {worker.rank} hangs: {describe(worker, workers)} (train.stall_timeout_s="
                f"{self._limits.stall_timeout_s}; process {worker.process} on {worker.node})"
            )
            self.stalls.append(stall)
            self._say(f"{stall}; it is ended")
            member = members.get(worker.rank)
            if member is not None and (member.node, member.process) == (worker.node, worker.process):
                ray.kill(unpacked(member.actor), no_restart=True)
        watch.ended(found, snapshot)

    def _wait_for_workers(self, watch: AttemptWatch, attempt: Attempt, snapshot: Snapshot) -> str | None:
        seconds = watch.waited_s(snapshot)
        if seconds > self._limits.start_timeout_s:
            raise RunFailed(
                f"the workers could not be started within train.start_timeout_s={self._limits.start_timeout_s}: "
                f"{self._missing() or 'there is room for them, but they do not start'}"
            )
        if watch.note_due(seconds):
            leaving = snapshot.controller is not None and snapshot.controller.leave is not None
            placed_s = watch.placed_s(seconds, not leaving and attempt.has_place())
            if placed_s > max(self._limits.stall_timeout_s, STARTING_S):
                return f"the workers have their places and have not started for {duration(seconds)}"
            missing = self._missing() or "there is room for them now"
            self._say(f"waiting for workers for {duration(seconds)}: {missing}")
        return None
