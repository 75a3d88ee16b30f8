"""Planned batches through Ray Data.

A row of the data set is the number of one micro-batch of one worker. Tasks on any CPU of the cluster look up its
samples in the plan, read, decode, augment and pad them, and return the micro-batch as one row of bytes. The plan is a
pure function of the step, so there is no state: to resume at step ``k``, the range of numbers begins at ``k``.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ExecutionResources

from detr_ray.data.loader import BatchLoader, from_table, to_table
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.stream.batches import WorkerPlan
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.runtime.ray_internals import ExecutionCallback
from detr_ray.structures import PaddedBatch

# Tasks of one Ray Data execution. Starting one takes about half a second, mostly while batches are still waiting; its
# bookkeeping grows with the number of its tasks.
SEGMENT_TASKS = 512

# Each task has an overhead of milliseconds, so one task makes several small micro-batches.
TASK_BYTES = 2 << 20
MAX_ROWS_PER_TASK = 16

TRAIN, EVALUATION = "train", "evaluation"


@functools.lru_cache(maxsize=2)
def _opened(ref: ray.ObjectRef) -> tuple[PlannedData, BatchLoader | None, BatchLoader | None]:
    """A job's data and its loaders, kept for the life of a task's process.

    One process makes batches of many workers. They share one plan: planning a window of an epoch takes longer than
    loading a batch, and does not depend on the worker.
    """
    data: PlannedData = ray.get(ref)
    torch.set_num_threads(1)  # one core for each data task: they share the machine with each other and with training
    return (data, *data.loaders())


@functools.lru_cache(maxsize=1024)
def _plan(ref: ray.ObjectRef, world_size: int, rank: int, micro_batch_size: int | None) -> WorkerPlan:
    return _opened(ref)[0].plan(world_size, rank, micro_batch_size)


class ScheduleCalmly(ExecutionCallback):  # type: ignore[misc]
    """Makes Ray Data's scheduling loop pause after each round.

    The loop runs in the training process. Without a pause it would hold Python's interpreter lock most of the time
    while batches are waiting, and training steps would take several times as long.
    """

    PAUSE_S = 0.01

    def on_execution_step(self, executor: Any) -> None:
        """Called by the loop after each round."""
        time.sleep(self.PAUSE_S)


class PlannedBatches:
    """The function of a data task: numbers of micro-batches in, micro-batches out.

    Args:
        data: reference to the planned data.
        split: ``train`` or ``evaluation``.
        world_size: number of training workers.
        rank: the worker that the batches are for.
        per_step: number of micro-batches of a step.
        first: number of row 0's micro-batch.
        micro_batch_size: most images of a micro-batch; None for no limit.
    """

    def __init__(
        self,
        data: ray.ObjectRef,
        split: str,
        world_size: int,
        rank: int,
        per_step: int,
        first: int,
        micro_batch_size: int | None = None,
    ) -> None:
        self._first = first
        self._data = data
        self._split = split
        self._world_size = world_size
        self._rank = rank
        self._per_step = per_step
        self._micro_batch_size = micro_batch_size

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Loads the micro-batches of some rows."""
        _, train_loader, evaluation_loader = _opened(self._data)
        plan = _plan(self._data, self._world_size, self._rank, self._micro_batch_size)
        numbers = [self._first + row for row in rows["id"].to_pylist()]
        if self._split == TRAIN:
            loader, batches = train_loader, [self._micro_batch(plan, number) for number in numbers]
        else:
            loader, batches = evaluation_loader, [plan.evaluation[number] for number in numbers]
        assert loader is not None, "the job has this split"
        for batch in loader.load_each(batches):
            yield to_table(batch)

    def _micro_batch(self, plan: WorkerPlan, number: int) -> tuple[SamplePlan, ...]:
        step, place = divmod(number, self._per_step)
        return plan.step(step)[place]


class RayBatches:
    """A `BatchSource` whose batches are made by Ray Data tasks.

    Args:
        data: the planned data.
        data_ref: the same in the object store.
        world_size: number of training workers.
        rank: this worker.
        tasks: most data tasks at the same time; None for ``data.tasks_per_worker``.
    """

    def __init__(
        self, data: PlannedData, data_ref: ray.ObjectRef, world_size: int, rank: int, tasks: int | None = None
    ) -> None:
        self._data_ref = data_ref
        self._world_size = world_size
        self._rank = rank
        self._tasks = tasks or data.config.data.tasks_per_worker
        self._prefetch = data.config.data.prefetch_batches
        self._plan = data.plan(world_size, rank)

    def train_batches(self, first_step: int, last_step: int) -> Iterator[list[PaddedBatch]]:
        """See `BatchSource`."""
        if first_step >= last_step:
            return
        micro_batches = self._plan.step(first_step)
        per_step = len(micro_batches)
        rows = range(first_step * per_step, last_step * per_step)
        step: list[PaddedBatch] = []
        for batch in self._stream(TRAIN, rows, per_step, rows_per_task(micro_batches[0])):
            step.append(batch)
            if len(step) == per_step:
                yield step
                step = []

    def limit_micro_batches(self, size: int) -> None:
        """See `BatchSource`."""
        self._plan.micro_batch_size = size

    def evaluation_batches(self) -> Iterator[PaddedBatch]:
        """See `BatchSource`."""
        batches = self._plan.evaluation
        if batches:
            yield from self._stream(EVALUATION, range(len(batches)), 1, rows_per_task(batches[0]))

    def _stream(self, split: str, rows: range, per_step: int, per_task: int) -> Iterator[PaddedBatch]:
        def segments() -> Iterator[PaddedBatch]:
            for start in range(rows.start, rows.stop, SEGMENT_TASKS * per_task):
                load = PlannedBatches(
                    self._data_ref, split, self._world_size, self._rank, per_step, start, self._plan.micro_batch_size
                )
                yield from self._segment(load, min(SEGMENT_TASKS * per_task, rows.stop - start), per_task)

        return in_background(segments, self._prefetch)

    def _segment(self, load: PlannedBatches, num_rows: int, per_task: int) -> Iterator[PaddedBatch]:
        """One Ray Data execution."""
        numbers = ray.data.range(num_rows, override_num_blocks=-(-num_rows // per_task))
        batches = numbers.map_batches(load, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
        execute_in_order(batches, self._tasks)
        for table in batches.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1):
            yield from_table(table)


def execute_in_order(rows: ray.data.Dataset, cpus: float) -> None:
    """Sets how Ray Data executes a data set: in the order of its rows, on at most so many CPUs, without a bar."""
    context = rows.context
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [ScheduleCalmly]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=cpus)


def rows_per_task(samples: Sequence[SamplePlan]) -> int:
    """How many micro-batches of about this size one task makes."""
    height, width = (max(sample.size[side] for sample in samples) for side in (0, 1))
    return max(1, min(MAX_ROWS_PER_TASK, TASK_BYTES // (3 * height * width * len(samples))))


_END = object()


def in_background(make: Callable[[], Iterator[PaddedBatch]], ahead: int) -> Iterator[PaddedBatch]:
    """Iterates in its own thread, some items ahead of the reader.

    An error in the thread is raised in the reader. If the reader stops early, the thread ends.
    """
    items: queue.Queue = queue.Queue(maxsize=max(ahead, 1))
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        source = make()
        try:
            for item in source:
                if not put(item):
                    break
            else:
                put(_END)
        except BaseException as error:  # raised again in the reader's thread
            put(error)
        finally:
            source.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=30)
