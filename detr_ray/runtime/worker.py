"""What a Ray Train worker does: its context, and the loop under it."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Full, Queue
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detr_ray.engine.errors import RunFailed
from detr_ray.engine.evaluation_job import EvaluationJob, run_evaluation
from detr_ray.engine.job import TrainJob
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.runtime.datasets import RayBatches
from detr_ray.engine.records import open_tracker
from detr_ray.tracking import NullTracker, Tracker

T = TypeVar("T")


class RayContext:
    """A `WorkerContext` for a worker of Ray Train, whose process group is already there.

    Args:
        lines: queue to the driver for lines of progress.
    """

    def __init__(self, lines: Queue) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._lines = lines
        if self.device.type == "cpu":
            # Ray gives each worker one thread; the workers of a machine share its cores evenly.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DistributedDataParallel; itself where there is one worker."""
        if self.world_size == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keeps gradients on this worker."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, item: T) -> list[T]:
        """Every worker's item."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def report(self, metrics: dict[str, float]) -> None:
        """Reports to Ray Train; a barrier over all workers."""
        ray.train.report(metrics)

    def say(self, line: str) -> None:
        """Sends a line to the driver."""
        send_line(self._lines, line)

    def stop_requested(self) -> bool:
        """Nobody asks yet."""
        return False


def send_line(lines: Queue, line: str) -> None:
    """Puts a line of progress into the driver's queue; a driver that is away is no reason to stop training."""
    try:
        lines.put_nowait(line)
    except (Full, ray.exceptions.RayActorError):
        print(line, flush=True)  # noqa: T201 - goes into this worker's log


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs the training loop on one worker.

    Args:
        config: ``job`` (without data), ``data`` and ``weights`` as lists of an object reference (Ray resolves bare ones),
            and the queue ``lines``.

    Returns:
        ``{"result": FitResult}``, or ``{"failed": message}`` where all workers agree that the run can't go on: Ray would
        start a worker that raises again, to the same end.
    """
    job: TrainJob = _whole_job(config)
    context = RayContext(config["lines"])
    batches = RayBatches(job.data, config["data"][0], context.world_size, context.rank)
    tracker: Tracker = NullTracker()
    if context.rank == 0:
        tracker = open_tracker(job)
    status = "FAILED"
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
