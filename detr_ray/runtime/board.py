"""The board between a job's driver, its workers and Ray Train's controller.

One small actor of the driver's. Workers put up what they do and their lines of progress; the driver reads them, and
puts up why the workers are to leave. The controller puts up its state. Everything on it is small and may be lost: who
can't reach the board goes on without it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # the board's process needs no torch, whose import takes seconds
    from detr_ray.engine.context import LeaveReason, Phase

logger = logging.getLogger(__name__)

NAMESPACE = "detr_ray"
MOST_LINES = 10_000

# Ray Train's states in which no worker runs, and some are to.
_WITHOUT_WORKERS = ("INITIALIZING", "SCHEDULING", "RESTARTING", "RESCHEDULING")

# One worker's beats; groups of hundreds beat more slowly, so that the board has a few hundred a second to take.
BEAT_S = 1.0
BEATS_PER_S = 200

# A worker that has not reached the board for this long has lost its driver, and with it whoever could go on with it.
ORPHANED_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """What one worker was doing when it last said so.

    Attributes:
        rank: the worker.
        world_size: workers of its group.
        node: address of its node.
        process: id of its process there.
        phase: what it does.
        step: at which optimizer step.
        seconds: for how long.
        silent_s: for how long nothing has been heard of the worker; a process that hangs as a whole says nothing.
    """

    rank: int
    world_size: int
    node: str
    process: int
    phase: Phase
    step: int
    seconds: float
    silent_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class News:
    """What is on the board.

    Attributes:
        lines: lines of progress, each given out once.
        beats: the last beat of each worker of the group, by rank, its ``seconds`` up to now.
        running: whether Ray Train has workers that run.
        since_s: for how many seconds it has, or has not.
        failures: what made Ray Train start the workers again, each given out once.
    """

    lines: list[str]
    beats: dict[int, Beat]
    running: bool
    since_s: float
    failures: list[str]


class _Board:
    """See the module. Calls are answered one after another and none takes long."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failures: list[str] = []
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._workers: dict[int, bytes] = {}
        self._leave: LeaveReason | None = None
        self._running, self._since = False, time.monotonic()
        self._controller: bytes | None = None

    def say(self, line: str) -> None:
        if len(self._lines) < MOST_LINES:
            self._lines.append(line)

    def beat(self, beat: Beat, worker: bytes) -> LeaveReason | None:
        if any(other.world_size != beat.world_size for other, _ in self._beats.values()):
            self.forget_workers()  # they belonged to an earlier group
        self._beats[beat.rank] = beat, time.monotonic()
        self._workers[beat.rank] = worker
        return self._leave

    def ask_to_leave(self, reason: LeaveReason | None, instead_of: LeaveReason | None = None) -> bool:
        """Puts a reason up; not over a more urgent one that is there already."""
        if reason is None and self._leave != instead_of:
            return False
        if self._leave != "asked":
            self._leave = reason
        return True

    def everyone_left(self) -> bool:
        return all(beat.phase == "leaving" for beat, _ in self._beats.values())

    def note_controller(self, controller: bytes) -> None:
        self._controller = controller

    def note_state(self, state: str, failure: str) -> None:
        running = state not in _WITHOUT_WORKERS
        if running != self._running:
            self._running, self._since = running, time.monotonic()
        if failure:
            self._failures.append(failure)
        if state in ("RESTARTING", "RESCHEDULING"):
            self.forget_workers()

    def forget_workers(self) -> None:
        self._beats, self._workers = {}, {}

    def news(self) -> News:
        now = time.monotonic()
        beats = {
            rank: dataclasses.replace(beat, seconds=beat.seconds + now - at, silent_s=now - at)
            for rank, (beat, at) in self._beats.items()
        }
        lines, self._lines = self._lines, []
        failures, self._failures = self._failures, []
        return News(lines, beats, self._running, now - self._since, failures)

    def worker(self, rank: int) -> bytes | None:
        return self._workers.get(rank)

    def controller(self) -> bytes | None:
        return self._controller


def packed(actor: ActorHandle) -> bytes:
    """A handle as the board keeps it: whoever unpacks one imports the actor's module, here all of Ray Train."""
    content: bytes = ray.cloudpickle.dumps(actor)
    return content


def unpacked(content: bytes) -> ActorHandle:
    """The handle that `packed` was given."""
    return ray.cloudpickle.loads(content)


def open_board(run_path: str | None) -> ActorHandle:
    """Starts a board.

    Args:
        run_path: the run that the job writes. Its board has the run's name in the cluster, so that a second job of the
            same run on it is refused, also where storage has no locks. None for a job that writes no run.

    Raises:
        ValueError: the run has a board in this cluster already.
    """
    # Beside the driver: on another node it would be lost with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board)
    if run_path is None:
        return board.remote()
    return board.options(name=f"run {run_path}", namespace=NAMESPACE).remote()


class Heart:
    """A worker's side of the board: says what it does, hears why it is to leave.

    Args:
        board: the job's board.
        rank: this worker.
        world_size: workers in the group.
    """

    def __init__(self, board: ActorHandle, rank: int, world_size: int) -> None:
        self._board = board
        self._rank, self._world_size = rank, world_size
        self._node = ray.util.get_node_ip_address()
        self._worker = packed(ray.get_runtime_context().current_actor)
        self._doing: tuple[Phase, int, float] = ("starting", 0, time.monotonic())
        self._stopped = threading.Event()
        self.leave_reason: LeaveReason | None = None
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Notes what the worker does from now on."""
        self._doing = (phase, step, time.monotonic())

    def stop(self) -> None:
        """Sends the last beat."""
        self._stopped.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        pause, last, heard = 0.0, False, time.monotonic()
        while not last:
            last = self._stopped.wait(pause)
            pause = max(BEAT_S, self._world_size / BEATS_PER_S)
            phase, step, since = self._doing
            beat = Beat(
                self._rank, self._world_size, self._node, os.getpid(), phase, step, time.monotonic() - since
            )  # fmt: skip
            asked: LeaveReason | None = None
            try:
                asked = ray.get(self._board.beat.remote(beat, self._worker), timeout=10)
                heard = time.monotonic()
            except ray.exceptions.RayError as error:
                logger.info("rank %d does not reach the board: %s", self._rank, error)
                if time.monotonic() - heard > ORPHANED_S:
                    asked = "asked"
            self.leave_reason = asked or ("preempted" if _node_is_taken_away() else None)


def _node_is_taken_away() -> bool:
    """Whether Ray Train has told this worker that a node of its group drains.

    The public way to ask, `ray.train.get_preemption_info`, is a barrier over all workers.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    preemption: Any = get_train_context().preemption_context
    return preemption.preemption_info is not None
