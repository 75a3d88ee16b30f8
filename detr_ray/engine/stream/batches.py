"""Sources of a worker's batches: the protocol, and the source that loads them in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from detr_ray.data.evaluation_plan import split_evaluation
from detr_ray.data.loader import BatchLoader
from detr_ray.data.planner import Planner, share_bounds
from detr_ray.data.sample import SamplePlan
from detr_ray.structures import PaddedBatch

A = TypeVar("A")
B = TypeVar("B")


class BatchSource(Protocol):
    """Gives a worker its planned batches."""

    def train_batches(self, first_step: int, last_step: int) -> Iterator[list[PaddedBatch]]:
        """This worker's micro-batches of each step ``first_step..last_step-1``, in order."""
        ...

    def limit_micro_batches(self, size: int) -> None:
        """Limits the number of images of a micro-batch from now on."""
        ...

    def evaluation_batches(self) -> Iterator[PaddedBatch]:
        """This worker's share of the validation set; over all workers, every image once."""
        ...


class WorkerPlan:
    """One worker's part of the plan: which samples make its micro-batches, for any step.

    Args:
        planner: plan of the training stream; None where nothing is trained.
        evaluation: gives all batches of the validation set; called when they are first needed.
        world_size: number of workers.
        rank: this worker.
        micro_batch_size: most images of one forward pass; None for no limit. May be changed between steps.
    """

    def __init__(
        self,
        planner: Planner | None,
        evaluation: Callable[[], Sequence[tuple[SamplePlan, ...]]],
        world_size: int,
        rank: int,
        micro_batch_size: int | None,
    ) -> None:
        self._planner = planner
        self._world_size = world_size
        self._rank = rank
        self.micro_batch_size = micro_batch_size
        self._plan_evaluation = evaluation

    @functools.cached_property
    def evaluation(self) -> list[tuple[SamplePlan, ...]]:
        """This worker's batches of the validation set."""
        return split_evaluation(self._plan_evaluation(), self._world_size, self._rank)

    def step(self, step: int) -> list[tuple[SamplePlan, ...]]:
        """This worker's micro-batches of one step."""
        assert self._planner is not None, "an evaluation has no training steps"
        size = self._planner.global_batch_size
        bounds = share_bounds(size, self._world_size, self._rank, self.micro_batch_size)
        return [self._planner.samples(step, first, last) for first, last in bounds]


class LocalBatches:
    """Loads planned batches in a thread of this process.

    Args:
        plan: this worker's part of the plan.
        train_loader: loads training samples; None where nothing is trained.
        evaluation_loader: loads validation samples; None where there are none.
        prefetch: batches that are loaded ahead; in training whole steps, so many that there are at least these.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        train_loader: BatchLoader | None,
        evaluation_loader: BatchLoader | None,
        prefetch: int = 2,
    ) -> None:
        self._plan = plan
        self._train_loader = train_loader
        self._evaluation_loader = evaluation_loader
        self._prefetch = prefetch

    def train_batches(self, first_step: int, last_step: int) -> Iterator[list[PaddedBatch]]:
        """See `BatchSource`."""

        def load(step: int) -> list[PaddedBatch]:
            assert self._train_loader is not None
            return [self._train_loader.load(samples) for samples in self._plan.step(step)]

        if first_step < last_step:
            per_step = len(self._plan.step(first_step))
            yield from load_ahead(load, range(first_step, last_step), -(-self._prefetch // per_step))

    def limit_micro_batches(self, size: int) -> None:
        """See `BatchSource`."""
        self._plan.micro_batch_size = size

    def evaluation_batches(self) -> Iterator[PaddedBatch]:
        """See `BatchSource`."""
        if self._evaluation_loader is not None:
            yield from load_ahead(self._evaluation_loader.load, self._plan.evaluation, self._prefetch)


def load_ahead(load: Callable[[A], B], arguments: Iterable[A], prefetch: int) -> Iterator[B]:
    """The results of ``load`` for all arguments, in order; a thread computes up to ``prefetch`` of them ahead.

    If the reader stops early, only the one that is being computed is waited for.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        pending: list[Future[B]] = []
        try:
            for argument in arguments:
                pending.append(pool.submit(load, argument))
                if len(pending) > prefetch:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
