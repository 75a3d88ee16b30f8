"""What a Ray Train worker does: its context, and the loop under it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle

from detr_ray.engine.context import LeaveReason, Phase
from detr_ray.engine.distributed import DistributedContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Evaluated
from detr_ray.engine.job import TrainJob
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.reporting.records import open_tracker
from detr_ray.engine.validation.evaluation_job import EvaluationJob, run_evaluation
from detr_ray.runtime.datasets import RayBatches
from detr_ray.runtime.heartbeat import WorkerHeartbeat
from detr_ray.tracking import NullTracker, Status, Tracker


class RayContext(DistributedContext):
    """The context of a Ray Train worker.

    Args:
        status: keeps the job's status.
        attempt: the start of Ray Train that this worker belongs to.
        threads: threads of torch on a CPU; None shares the machine's cores among its workers.
    """

    def __init__(self, status: ActorHandle, attempt: int, threads: int | None) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), device)
        self._heartbeat = WorkerHeartbeat(status, attempt, self.rank, self.world_size)
        if device.type == "cpu":
            # Ray gives each worker one thread; the workers of a machine share its cores evenly.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(threads or max(1, cores // context.get_local_world_size()))

    def report(self, evaluated: Evaluated) -> None:
        """Reports to Ray Train, a barrier over all workers; rank 0 tells the driver, too."""
        if self.rank == 0:
            self._heartbeat.report(evaluated)
        ray.train.report(dict(evaluated.metrics))

    def say(self, line: str) -> None:
        """Sends a line to the driver; a driver that is away is no reason to stop."""
        self._heartbeat.say(line)

    def enter(self, phase: Phase, step: int) -> None:
        """Goes to the job's status with the next heartbeat."""
        self._heartbeat.enter(phase, step)

    def leave_reason(self) -> LeaveReason | None:
        """What the job's status or Ray Train said last."""
        return self._heartbeat.leave_reason

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Shows the user what this project's code warns of; at the end, all that was said has arrived."""
        project = logging.getLogger("detr_ray")
        warnings = _WarningsToDriver(self)
        project.addHandler(warnings)
        try:
            yield
        finally:
            project.removeHandler(warnings)
            self._heartbeat.flush()


class _WarningsToDriver(logging.Handler):
    """Shows the user warnings of a worker, whose own output is not shown."""

    def __init__(self, context: RayContext) -> None:
        super().__init__(logging.WARNING)
        self._worker = "" if context.rank == 0 else f" (rank {context.rank})"
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a warning."""
        self._context.say(f"WARNING{self._worker}: {record.getMessage()}")


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Does one worker's part of a job.

    Args:
        config: ``job`` (without data), ``data`` and ``weights`` as lists of an object reference (Ray resolves bare
            ones), the actor ``status`` and the number of the ``attempt``, ``threads`` of torch, or None, and how many
            data ``tasks`` the worker may have at the same time.

    Returns:
        ``{"result": what the work gave}``, or ``{"failed": message}`` where all workers agree that the job can't go on:
        Ray would start workers that fail again, to the same end.
    """
    job: TrainJob | EvaluationJob = _whole_job(config)
    context = RayContext(config["status"], config["attempt"], config["threads"])
    batches = RayBatches(job.data, config["data"][0], context.world_size, context.rank, config["tasks"])
    try:
        with context.at_work():
            if isinstance(job, TrainJob):
                return {"result": _train(job, context, batches)}
            return {"result": run_evaluation(job, context, batches)}
    except RunFailed as error:
        if not error.agreed:
            raise
        return {"failed": str(error)}


def _train(job: TrainJob, context: RayContext, batches: RayBatches) -> FitResult:
    tracker: Tracker = open_tracker(job) if context.rank == 0 else NullTracker()
    status: Status = "FAILED"
    try:
        result = TrainingLoop(job, context, batches, tracker).run()
        status = "FINISHED" if result.status != "stopped" else "KILLED"
        return result
    finally:
        tracker.finish(status)


def _whole_job(config: dict[str, Any]) -> Any:
    """The job with its data and weights, which travel beside it: data tasks need only the data."""
    parts = {"data": ray.get(config["data"][0])}
    if config["weights"]:
        parts["initial_weights"] = ray.get(config["weights"][0])
    return dataclasses.replace(ray.get(config["job"][0]), **parts)
