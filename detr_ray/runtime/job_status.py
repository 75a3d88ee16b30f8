"""The status of a job: what its workers and Ray Train's controller do, and why the workers are to leave.

A small actor on the driver's node keeps it. Workers and the controller send it their complete state once a second (a
heartbeat). The driver reads everything twice a second, and sends its own state with each query. So the actor can be
replaced at any time: one second after a restart it has the same content. Only lines of progress that were not read yet
are lost.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from detr_ray.engine.hooks import Evaluated

if TYPE_CHECKING:  # the actor's process needs no torch, whose import takes seconds
    from detr_ray.engine.context import LeaveReason, Phase

NAMESPACE = "detr_ray"
MOST_LINES = 10_000

# Ray Train's states in which workers should run, but do not run yet.
_WITHOUT_WORKERS = ("INITIALIZING", "SCHEDULING", "RESTARTING", "RESCHEDULING")

# How long the state of a process is kept after its last heartbeat, if the controller does not list it as a worker.
_FORGOTTEN_S = 60.0

Process = tuple[str, int]
"""Address of a node, and the id of a process there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A job for workers.

    Attributes:
        number: of the job; consecutive jobs of the same workers have ascending numbers from 1.
        job: reference to the job without its data and weights, and to its configuration; in a list, because Ray would
            resolve a bare reference.
        data: reference to the data, in a list.
        weights: reference to the first weights, in a list that may be empty.
        last: whether the workers end after it. Otherwise they wait for another job.
    """

    number: int
    job: list[ray.ObjectRef]
    data: list[ray.ObjectRef]
    weights: list[ray.ObjectRef]
    last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The state of a worker at its last heartbeat.

    Attributes:
        attempt: the start of Ray Train that it belongs to.
        rank: the worker.
        world_size: workers of its group.
        node: address of its node.
        process: id of its process there.
        phase: what it does.
        step: at which optimizer step.
        seconds: for how long.
        silent_s: seconds since its last heartbeat; a frozen process sends none.
        heard: whether it has sent a heartbeat.
        task: number of its present or last job.
        evaluated: the job's last evaluations, oldest first; from rank 0 only.
        outcome: the job's outcome, pickled; from rank 0 only, None before the end.
    """

    attempt: int
    rank: int
    world_size: int
    node: str
    process: int
    phase: Phase
    step: int
    seconds: float
    silent_s: float = 0.0
    heard: bool = True
    task: int = 0
    evaluated: tuple[Evaluated, ...] = ()
    outcome: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A worker as the controller knows it.

    Attributes:
        node: address of its node.
        process: id of its process there.
        actor: its handle, pickled: unpickling it imports the actor's module, here all of Ray Train.
    """

    node: str
    process: int
    actor: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ControllerStatus:
    """The state of Ray Train's controller at its last heartbeat.

    Attributes:
        attempt: the start of Ray Train that it belongs to.
        process: id of its process, on the driver's node.
        state: Ray Train's name for what it does.
        state_s: seconds since this state began.
        workers_s: seconds since workers began to run, or since none runs.
        idle_s: seconds since the last round of its loop.
        failures: why it started the workers again, all of them.
        group: number of the group of workers that runs now; another one after each start.
        group_s: seconds since the group began to train.
        leave: why the workers are to leave, if the controller says so.
        silent_s: seconds since its last heartbeat.
    """

    attempt: int
    process: int
    state: str
    state_s: float
    workers_s: float
    idle_s: float
    failures: tuple[str, ...]
    group: int
    group_s: float
    leave: LeaveReason | None = None
    silent_s: float = 0.0

    @property
    def running(self) -> bool:
        """Whether there are workers that run."""
        return self.state not in _WITHOUT_WORKERS


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """Lines of progress that are sent to the driver, numbered so that none is shown twice.

    Attributes:
        source: what the numbers belong to.
        first: number of the first one.
        texts: the lines.
    """

    source: str
    first: int
    texts: tuple[str, ...]

    @property
    def end(self) -> int:
        """Number of the line after the last one."""
        return self.first + len(self.texts)


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """The status of a job at one moment.

    Attributes:
        lines: lines of progress that were not read yet.
        workers: the workers of the running group, by rank, with times up to now.
        controller: Ray Train's controller; None before its first heartbeat.
        age_s: seconds since the actor was started; it cannot report a longer silence.
        task: rank 0's present or last job; ``evaluated`` and ``outcome`` belong to it.
        evaluated: its last evaluations, including some of earlier snapshots.
        outcome: its outcome, pickled; None before the end.
    """

    lines: Lines
    workers: dict[int, WorkerStatus]
    controller: ControllerStatus | None
    age_s: float
    task: int = 0
    evaluated: tuple[Evaluated, ...] = ()
    outcome: bytes | None = None

    @property
    def running(self) -> bool:
        """Whether workers run: according to the controller, or without a controller by their own heartbeats."""
        return bool(self.workers) if self.controller is None else self.controller.running


class JobStatus:
    """The actor. Calls are answered one after another; none takes long."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._id = uuid.uuid4().hex
        self._attempt = 0
        self._asked: LeaveReason | None = None
        self._controller: tuple[ControllerStatus, float] | None = None
        self._members: dict[int, Member] = {}
        self._group = -1
        self._workers: dict[Process, tuple[WorkerStatus, float]] = {}
        self._lines: list[str] = []
        self._lines_before = 0
        self._taken: dict[str, int] = {}
        self._done: tuple[int, tuple[Evaluated, ...], bytes | None] = (0, (), None)
        self._task: Task | None = None

    def worker_beat(self, status: WorkerStatus, lines: Lines) -> LeaveReason | None:
        """A worker's heartbeat; returns the reason to leave."""
        if not self._is_current(status.attempt):
            return None
        self._take(lines)
        if status.rank == 0 and status.task >= self._done[0]:
            known = self._done[1] if status.task == self._done[0] else ()
            self._done = status.task, status.evaluated or known, status.outcome
        self._workers[status.node, status.process] = status, time.monotonic()
        return self._leave(status)

    def controller_beat(
        self, status: ControllerStatus, members: dict[int, Member] | None, lines: Lines
    ) -> tuple[int, bool]:
        """The controller's heartbeat.

        Args:
            status: what it does.
            members: the workers of its group; None if they are known here already.
            lines: its lines of progress.

        Returns:
            The group whose members are known here (-1 for none), and whether all of them have left.
        """
        if not self._is_current(status.attempt):
            return status.group, False
        self._take(lines)
        self._controller = status, time.monotonic()
        if members is not None:
            self._members, self._group = members, status.group
            self._forget_strangers()
        if status.group != self._group:
            return -1, False
        workers = [self._workers.get((member.node, member.process)) for member in self._members.values()]
        return self._group, bool(workers) and all(w is not None and w[0].phase == "leaving" for w in workers)

    def task(self, after: int) -> Task | None:
        """The job to do after another one; None while there is none."""
        return self._task if self._task is not None and self._task.number > after else None

    def ask(self, attempt: int, task: Task | None, asked: LeaveReason | None, seen: tuple[str, int]) -> Snapshot:
        """The driver's query.

        Args:
            attempt: the current start of Ray Train; heartbeats of earlier ones are ignored from now on.
            task: the present job of the workers; None if they wait for the next one.
            asked: the driver's reason for them to leave this job, if there is one.
            seen: the lines that the driver has: their source, and the number after the last line.
        """
        self._is_current(attempt)
        self._asked, self._task = asked, task
        if seen[0] == self._id:
            del self._lines[: seen[1] - self._lines_before]
            self._lines_before = seen[1]
        now, controller = time.monotonic(), self._controller
        return Snapshot(
            Lines(self._id, self._lines_before, tuple(self._lines)),
            self._current_workers(now),
            None if controller is None else _up_to_now(*controller, now),
            now - self._began,
            *self._done,
        )

    def members(self) -> dict[int, Member]:
        """The workers of the controller's group, with their handles."""
        return self._members if self._controller is not None and self._controller[0].group == self._group else {}

    def _is_current(self, attempt: int) -> bool:
        """Forgets the attempt before if this is a newer one; returns whether it is the newest."""
        if attempt > self._attempt:
            self._attempt = attempt
            self._controller, self._members, self._group, self._workers = None, {}, -1, {}
        return attempt == self._attempt

    def _leave(self, worker: WorkerStatus) -> LeaveReason | None:
        at_task = self._task is not None and self._task.number == worker.task and worker.phase != "waiting for a run"
        if self._asked is not None and at_task:
            return self._asked
        return None if self._controller is None else self._controller[0].leave

    def _take(self, lines: Lines) -> None:
        """Keeps the new lines. A heartbeat whose answer was late is sent again, with lines that are known."""
        new = lines.texts[max(0, self._taken.get(lines.source, lines.first) - lines.first) :]
        self._lines += new[: max(0, MOST_LINES - len(self._lines))]
        self._taken[lines.source] = max(lines.end, self._taken.get(lines.source, 0))

    def _current_workers(self, now: float) -> dict[int, WorkerStatus]:
        """The workers of the controller's group; all workers with a heartbeat if the controller has none."""
        if self._controller is None:
            by_age = sorted(self._workers.values(), key=lambda item: item[1])
            return {status.rank: _worker_up_to_now(status, at, now) for status, at in by_age}
        controller, at = self._controller
        there = controller.running or controller.leave is not None  # before a resize, workers leave and are then ended
        if not there or controller.group != self._group:
            return {}
        unheard_s = min(controller.group_s + now - at, now - self._began)
        found = {}
        for rank, member in self._members.items():
            if (member.node, member.process) in self._workers:
                found[rank] = _worker_up_to_now(*self._workers[member.node, member.process], now)
            else:
                found[rank] = WorkerStatus(
                    self._attempt, rank, len(self._members), member.node, member.process, "starting", 0, unheard_s,
                    unheard_s, heard=False,
                )  # fmt: skip
        return found

    def _forget_strangers(self) -> None:
        known = {(member.node, member.process) for member in self._members.values()}
        since = time.monotonic() - _FORGOTTEN_S
        self._workers = {key: item for key, item in self._workers.items() if key in known or item[1] > since}


def _worker_up_to_now(status: WorkerStatus, at: float, now: float) -> WorkerStatus:
    return dataclasses.replace(status, seconds=status.seconds + now - at, silent_s=now - at)


def _up_to_now(status: ControllerStatus, at: float, now: float) -> ControllerStatus:
    since = now - at
    return dataclasses.replace(
        status, state_s=status.state_s + since, workers_s=status.workers_s + since, idle_s=status.idle_s + since,
        group_s=status.group_s + since, silent_s=since,
    )  # fmt: skip


def open_job_status(run_path: str | None) -> ActorHandle:
    """Starts the actor that keeps a job's status.

    Args:
        run_path: the run that the job writes. The actor has the run's name in the cluster, so that a second job of the
            same run on it is refused, also where storage has no locks. None for a job that writes no run.

    Raises:
        ValueError: the run has such an actor in this cluster already.
    """
    # Beside the driver: on another node it would be lost with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Restarted whenever it dies; existing handles stay valid.
    actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(JobStatus)
    if run_path is None:
        return actor.remote()
    return actor.options(name=f"run {run_path}", namespace=NAMESPACE).remote()


def packed(actor: ActorHandle) -> bytes:
    """Pickles a handle; see `Member`."""
    content: bytes = ray.cloudpickle.dumps(actor)
    return content


def unpacked(content: bytes) -> ActorHandle:
    """The inverse of `packed`."""
    return ray.cloudpickle.loads(content)
