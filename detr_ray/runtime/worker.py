"""A Ray Train worker: its context, and the loop in it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import time
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
from detr_ray.engine.recorded_training import run_training
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.validation.evaluation_job import EvaluationJob, run_evaluation
from detr_ray.runtime.cores import usable_cores
from detr_ray.runtime.datasets import RayBatches
from detr_ray.runtime.heartbeat import ANSWER_WITHIN_S, WorkerHeartbeat
from detr_ray.runtime.job_status import Task

logger = logging.getLogger(__name__)

NEXT_TASK_S = 0.2


class RayContext(DistributedContext):
    """The context of a Ray Train worker.

    Args:
        status: keeps the job's status.
        attempt: the start of Ray Train that this worker belongs to.
        threads: threads of torch on a CPU; None shares the machine's cores among its workers.
    """

    def __init__(self, status: ActorHandle, attempt: int, threads: int | None) -> None:
        context = ray.train.get_context()
        self._status = status
        self._step = 0
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), device)
        self._heartbeat = WorkerHeartbeat(status, attempt, self.rank, self.world_size)
        if device.type == "cpu":
            # Ray sets one thread for each worker; here the workers of a machine share its cores evenly.
            torch.set_num_threads(threads or max(1, usable_cores() // context.get_local_world_size()))

    def report(self, evaluated: Evaluated) -> None:
        """Reports to Ray Train, a barrier over all workers; rank 0 tells the driver, too."""
        if self.rank == 0:
            self._heartbeat.report(evaluated)
        ray.train.report(dict(evaluated.metrics))

    def say(self, line: str) -> None:
        """Sends a line to the driver; an unreachable driver is no reason to stop."""
        self._heartbeat.say(line)

    def enter(self, phase: Phase, step: int) -> None:
        """Sent to the job's status with the next heartbeat."""
        self._step = step
        self._heartbeat.enter(phase, step)

    def begin_task(self, task: Task) -> None:
        """Notes the job that this worker does from now on."""
        self._heartbeat.begin(task.number)

    def end_task(self, outcome: dict[str, Any]) -> None:
        """Sends the job's outcome to the driver (rank 0 only)."""
        if self.rank == 0:
            self._heartbeat.end(pickle.dumps(outcome))

    def next_task(self, after: int) -> Task | None:
        """Waits for the next job; None if this worker is to leave before there is one."""
        self.enter("waiting for a run", self._step)
        self._heartbeat.wait()
        while self._heartbeat.leave_reason is None:
            try:
                task: Task | None = ray.get(self._status.task.remote(after), timeout=ANSWER_WITHIN_S)
            except ray.exceptions.RayError as error:
                logger.info("the job's status is not reached: %s", error)
            else:
                if task is not None:
                    return task
            time.sleep(NEXT_TASK_S)
        self.enter("leaving", self._step)
        return None

    def leave_reason(self) -> LeaveReason | None:
        """The last reason from the job's status or from Ray Train."""
        return self._heartbeat.leave_reason

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Shows the user warnings of this project's code; at the end, all lines have been received."""
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
    """Runs a worker's part of one job after another.

    Args:
        config: the actor ``status``; the number of the ``attempt``; ``threads`` of torch or None; the number of
            concurrent data ``tasks`` of the worker; and ``only_task``, None if the worker asks for its jobs.

    Returns:
        The outcome of the last job: ``{"result": ...}``, or ``{"failed": message}`` if all workers agree that the job
        cannot go on; an exception would make Ray restart the workers, which would fail again.
    """
    context = RayContext(config["status"], config["attempt"], config["threads"])
    task: Task | None = config["only_task"] or context.next_task(0)
    outcome: dict[str, Any] = {"result": None}
    while task is not None:
        outcome = _do(task, context, config["tasks"])
        result = outcome.get("result")
        if task.last or (isinstance(result, FitResult) and result.leave in ("resized", "preempted")):
            break
        context.end_task(outcome)
        task = context.next_task(task.number)
    return outcome


def _do(task: Task, context: RayContext, data_tasks: int) -> dict[str, Any]:
    context.begin_task(task)
    job: TrainJob | EvaluationJob = _whole_job(task)
    batches = RayBatches(job.data, task.data[0], context.world_size, context.rank, data_tasks)
    try:
        with context.at_work():
            if isinstance(job, TrainJob):
                return {"result": run_training(job, context, batches)}
            return {"result": run_evaluation(job, context, batches)}
    except RunFailed as error:
        if not error.agreed:
            raise
        return {"failed": str(error)}


def _whole_job(task: Task) -> Any:
    """The job with its data and weights, which are sent separately, because data tasks need only the data."""
    bare, config = ray.get(task.job[0])
    parts: dict[str, Any] = {"data": dataclasses.replace(ray.get(task.data[0]), config=config)}
    if task.weights:
        parts["initial_weights"] = ray.get(task.weights[0])
    return dataclasses.replace(bare, **parts)
