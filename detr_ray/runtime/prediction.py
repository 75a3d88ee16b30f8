"""Prediction with Ray Data: tasks make the batches, actors with the model detect objects on them.

A row is the number of one batch of the job. Data tasks on any CPU of the cluster read, decode and resize its images;
actors, each with a GPU or some CPUs, run the model. Results have the order of the batches. A large job is a sequence of
Ray Data executions, since their bookkeeping grows with the number of tasks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from detr_ray.config import Config
from detr_ray.data.errors import DataError
from detr_ray.data.loader import BatchLoader, from_table, to_table
from detr_ray.evaluation import DetectionTable
from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction.job import BatchFindings, BatchPredictor, PredictionJob
from detr_ray.runtime.datasets import execute_in_order, rows_per_task
from detr_ray.runtime.prediction_actors import Actors, plan_actors

Numbers = Sequence[int]

_BLOCKS_AN_ACTOR = 8

SEGMENT_TASKS = 512
"""Data tasks of one execution for each of its actors, which start anew with each: so that this takes little time."""


def predict_on_cluster(job: PredictionJob, numbers: Numbers, config: Config) -> Iterator[BatchFindings]:
    """Detects objects on batches of a job; Ray must be running.

    Args:
        job: the job.
        numbers: of its batches, in the order of the results.
        config: has the number of workers, whether they use GPUs, and the number of data tasks of each.

    Raises:
        ConfigError: the cluster has no room for the workers.
        DataError: the storage of the images failed.
    """
    if not numbers:
        return
    actors = plan_actors(config, job, len(numbers))
    stored = StoredJob.of(job)
    try:
        while numbers:
            segment = numbers[: SEGMENT_TASKS * actors.count * _per_task(job, numbers, actors)]
            numbers = numbers[len(segment) :]
            found = predictions(stored, segment, actors)
            for table in found.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1):
                yield from_row(table)
    except ray.exceptions.RayError as error:
        raise _for_users(error) from error


@dataclass(frozen=True)
class StoredJob:
    """A job in Ray's object store.

    Attributes:
        job: the job.
        whole: reference to it.
        for_batches: reference to it without its weights.
    """

    job: PredictionJob
    whole: ray.ObjectRef
    for_batches: ray.ObjectRef

    @classmethod
    def of(cls, job: PredictionJob) -> StoredJob:
        """Stores a job."""
        return cls(job, ray.put(job), ray.put(job.without_weights()))


def _per_task(job: PredictionJob, numbers: Numbers, actors: Actors) -> int:
    """Rows of a data task. At the end of the job, large tasks would leave some actors without work."""
    return min(rows_per_task(job.batches[numbers[0]]), -(-len(numbers) // (_BLOCKS_AN_ACTOR * actors.count)))


def predictions(stored: StoredJob, numbers: Numbers, actors: Actors) -> ray.data.Dataset:
    """What is found on batches of a job, as rows that are computed when they are read; see `predict_on_cluster`."""
    rows = ray.data.range(len(numbers), override_num_blocks=-(-len(numbers) // _per_task(stored.job, numbers, actors)))
    batches = rows.map_batches(
        _MadeBatches(stored.for_batches, tuple(numbers)),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    found = batches.map_batches(
        _PredictingActor,
        fn_constructor_args=(stored.whole, actors.use_gpu, actors.threads),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(size=actors.count, max_tasks_in_flight_per_actor=2),
        num_cpus=actors.num_cpus,
        num_gpus=1 if actors.use_gpu else 0,
        resources=dict(actors.custom) or None,
        # Any node. It keeps the actors apart from the tasks: Ray Data makes one operator of two that ask for the same,
        # and each actor would decode its own images, one batch after the other with the model.
        label_selector={},
    )
    execute_in_order(found, actors.num_cpus * actors.count + actors.tasks)
    # Ray Data sets its levels with its first data set: each execution would be announced, and that no bar is shown.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return found


def _for_users(error: BaseException) -> BaseException:
    """The error for users inside an error of a task or an actor; the error itself if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DataError | WeightsError):
            return type(cause)(str(getattr(cause, "cause", cause)))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error


@functools.lru_cache(maxsize=2)
def _opened(ref: ray.ObjectRef) -> tuple[PredictionJob, BatchLoader]:
    """A job and its loader, kept as long as the task's process lives."""
    job: PredictionJob = ray.get(ref)
    torch.set_num_threads(1)  # one core for each, as for data tasks of training
    return job, job.loader()


class _MadeBatches:
    """The function of a data task: rows in, batches out.

    Args:
        job: reference to the job.
        numbers: number of the batch of each row.
    """

    def __init__(self, job: ray.ObjectRef, numbers: tuple[int, ...]) -> None:
        self._job = job
        self._numbers = numbers

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        job, loader = _opened(self._job)
        wanted = [job.batches[self._numbers[row]] for row in rows["id"].to_pylist()]
        for batch in loader.load_each(wanted):
            yield to_table(batch)


class _PredictingActor:
    """The actor with the model: takes a batch, returns its detections.

    Args:
        job: reference to the job.
        use_gpu: whether it has a GPU.
        threads: threads of torch.
    """

    def __init__(self, job: ray.ObjectRef, use_gpu: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self._predict = BatchPredictor(ray.get(job), "cuda" if use_gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return to_row(self._predict(from_table(batch)))


_LISTS = {"image_ids": np.int64, "category_ids": np.int64, "boxes_xywh_px": np.float32, "scores": np.float32}


def to_row(found: BatchFindings) -> pa.Table:
    """A table of one row with the detections of a batch; a batch may have none."""
    columns = {
        name: pa.array([getattr(found.detections, name).reshape(-1)], pa.list_(pa.from_numpy_dtype(dtype)))
        for name, dtype in _LISTS.items()
    }
    bad = {"bad_ids": pa.array([list(found.bad_images)], pa.list_(pa.int64()))}
    return pa.table(columns | bad | {"bad_lines": pa.array([list(found.bad_images.values())], pa.list_(pa.string()))})


def from_row(table: pa.Table) -> BatchFindings:
    """The inverse of `to_row`."""
    columns = {name: np.array(table[name][0].values, dtype) for name, dtype in _LISTS.items()}
    columns["boxes_xywh_px"] = columns["boxes_xywh_px"].reshape(-1, 4)
    bad = zip(table["bad_ids"][0].as_py(), table["bad_lines"][0].as_py(), strict=True)
    return BatchFindings(DetectionTable(**columns), dict(bad))
