"""Finds hanging processes from the status of a job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from detr_ray.engine.context import Phase
from detr_ray.engine.reporting.progress import duration
from detr_ray.runtime.job_status import ControllerStatus, WorkerStatus

STARTING_S = 120.0
"""Time limit in seconds for the first heartbeat: imports take seconds, on a busy machine up to a minute."""

LEAVING_S = 900.0
"""Time limit in seconds for the end of a process: it sends its records first, which has its own limits."""

SHUTTING_DOWN_S = 120.0
"""Ray Train waits some seconds for the end of workers, and half a minute for torch's process group."""

_PHASES = get_args(Phase)


def hanging_workers(workers: Mapping[int, WorkerStatus], limit_s: float) -> list[WorkerStatus]:
    """The workers that hang.

    A worker without heartbeats for too long hangs. If a worker with heartbeats hangs, the others wait for it in a sum
    or an exchange of gradients. So the workers whose work has advanced least hang, if they stay there for too long.

    Args:
        workers: all of the group, by rank.
        limit_s: how long a phase may take.
    """
    silent = [worker for worker in workers.values() if worker.silent_s > _limit(worker, limit_s)]
    if silent or not workers:
        return silent
    behind = min(map(_place, workers.values()))
    last = [worker for worker in workers.values() if _place(worker) == behind]
    return [worker for worker in last if worker.seconds > _limit(worker, limit_s)]


def _place(worker: WorkerStatus) -> tuple[bool, int, int]:
    return worker.heard, worker.step, _PHASES.index(worker.phase)


def _limit(worker: WorkerStatus, limit_s: float) -> float:
    if not worker.heard:
        return max(limit_s, STARTING_S)
    if worker.phase == "waiting for a run" and worker.silent_s < limit_s:
        return math.inf
    return max(limit_s, LEAVING_S) if worker.phase == "leaving" and worker.silent_s < limit_s else limit_s


def hanging_controller(controller: ControllerStatus, limit_s: float) -> str | None:
    """Why a controller counts as hanging, from its last heartbeat; None if it works."""
    # While workers run, its loop runs twice a second. In other states it waits, with limits of its own.
    stands_still = controller.state in ("RUNNING", "PREEMPTING") and controller.idle_s > limit_s
    if controller.silent_s > limit_s or (stands_still and controller.silent_s > controller.idle_s / 2):
        return f"nothing heard of it for {duration(controller.silent_s)}, last {controller.state}"
    if stands_still:
        return f"{controller.state}, but standing still for {duration(controller.idle_s)}"
    ending = controller.state in ("SHUTTING_DOWN", "FINISHED", "ERRORED", "ABORTED")
    if ending and controller.state_s > max(limit_s, SHUTTING_DOWN_S):
        return f"{controller.state} for {duration(controller.state_s)}"
    return None


def describe(worker: WorkerStatus, workers: Mapping[int, WorkerStatus]) -> str:
    """Text: what a hanging worker did last, and what the others do."""
    doing = f"{worker.phase} at step {worker.step}"
    if worker.heard and worker.silent_s < worker.seconds / 2:
        return f"{doing} for {duration(worker.seconds)}"
    last = f", last {doing}" if worker.heard else " since it was started"
    others = ", ".join(sorted({f"{other.phase} at step {other.step}" for other in workers.values() if other != worker}))
    return f"nothing heard of it for {duration(worker.silent_s)}{last}; the others: {others or 'none'}"


def places(workers: Mapping[int, WorkerStatus]) -> str:
    """Which ranks are on which node, as in ``rank 0 on 10.0.0.1; ranks 1, 2 on 10.0.0.2``."""
    ranks: dict[str, list[str]] = {}
    for rank, worker in sorted(workers.items()):
        ranks.setdefault(worker.node, []).append(str(rank))
    parts = (f"rank{'s' if len(on) > 1 else ''} {', '.join(on)} on {node}" for node, on in ranks.items())
    return "; ".join(parts)
