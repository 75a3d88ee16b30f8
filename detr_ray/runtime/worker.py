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
from ray.util.queue import Full, Queue

from detr_ray.engine.distributed import DistributedContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.evaluation_job import EvaluationJob, run_evaluation
from detr_ray.engine.job import TrainJob
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.records import open_tracker
from detr_ray.runtime.datasets import RayBatches
from detr_ray.tracking import NullTracker, Status, Tracker


class RayContext(DistributedContext):
    """The context of a Ray Train worker.

    Args:
        lines: queue to the driver for lines of progress.
    """

    def __init__(self, lines: Queue) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        super().__init__(context.get_world_rank(), context.get_world_size(), device)
        self._lines = lines
        if device.type == "cpu":
            # Ray gives each worker one thread; the workers of a machine share its cores evenly.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    def report(self, metrics: dict[str, float]) -> None:
        """Reports to Ray Train; a barrier over all workers."""
        ray.train.report(metrics)

    def say(self, line: str) -> None:
        """Sends a line to the driver."""
        send_line(self._lines, line)


def send_line(lines: Queue, line: str) -> None:
    """Puts a line of progress into the driver's queue; a driver that is away is no reason to stop training."""
    try:
        lines.put_nowait(line)
    except (Full, ray.exceptions.RayActorError):
        print(line, flush=True)  # noqa: T201 - goes into this worker's log


class WarningsToDriver(logging.Handler):
    """Shows the user what this project's code warns of in a worker, whose own output is not shown.

    Args:
        context: the worker.
        lines: queue to the driver.
    """

    def __init__(self, context: RayContext, lines: Queue) -> None:
        super().__init__(logging.WARNING)
        self._worker = "" if context.rank == 0 else f" (rank {context.rank})"
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a warning."""
        send_line(self._lines, f"WARNING{self._worker}: {record.getMessage()}")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hears warnings while it lasts."""
        project = logging.getLogger("detr_ray")
        project.addHandler(self)
        try:
            yield
        finally:
            project.removeHandler(self)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs the training loop on one worker.

    Args:
        config: ``job`` (without data), ``data`` and ``weights`` as lists of an object reference (Ray resolves bare
            ones), and the queue ``lines``.

    Returns:
        ``{"result": FitResult}``, or ``{"failed": message}`` where all workers agree that the run can't go on: Ray
        would start a worker that raises again, to the same end.
    """
    job: TrainJob = _whole_job(config)
    context = RayContext(config["lines"])
    batches = RayBatches(job.data, config["data"][0], context.world_size, context.rank)
    with WarningsToDriver(context, config["lines"]).attached():
        tracker: Tracker = open_tracker(job) if context.rank == 0 else NullTracker()
        status: Status = "FAILED"
        try:
            result: FitResult = TrainingLoop(job, context, batches, tracker).run()
            status = "FINISHED" if result.status != "stopped" else "KILLED"
            return {"result": result}
        except RunFailed as error:
            if not error.agreed:
                raise
            return {"failed": str(error)}
        finally:
            tracker.finish(status)


def evaluate_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Evaluates a checkpoint on one worker; takes and returns what `train_worker` does."""
    job: EvaluationJob = _whole_job(config)
    context = RayContext(config["lines"])
    batches = RayBatches(job.data, config["data"][0], context.world_size, context.rank)
    try:
        return {"result": run_evaluation(job, context, batches)}
    except RunFailed as error:
        if not error.agreed:
            raise
        return {"failed": str(error)}


def _whole_job(config: dict[str, Any]) -> Any:
    """The job with its data and weights, which travel beside it: data tasks need only the data."""
    parts = {"data": ray.get(config["data"][0])}
    if config["weights"]:
        parts["initial_weights"] = ray.get(config["weights"][0])
    return dataclasses.replace(ray.get(config["job"][0]), **parts)
