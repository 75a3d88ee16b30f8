"""Hooks of a training run: what it asks and tells the program that started it.

Everything has a default: a run without hooks trains to its end and takes what its configuration says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation in the course of training gave.

    Attributes:
        step: optimizer steps that the weights had taken.
        metrics: its numbers, by name (``val/AP``, ...).
        checkpoint: folder of the checkpoint with these weights; it may be removed later (``train.keep_last``) unless it
            is the best one. None if there is none, and on ranks other than 0.
    """

    step: int
    metrics: Mapping[str, float]
    checkpoint: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """The most that a run may take of the cluster; None stands for no limit.

    Attributes:
        workers: the number of training workers, or the least and the most, in place of ``train.num_workers``.
        cpus: CPUs of its workers and data tasks together. Each CPU worker takes one, and one is for data tasks.
        gpus: GPUs; 0 trains on CPUs unless the configuration asks for GPUs.
        threads: threads of torch in each CPU worker; None shares a node's cores among its workers, as if no other run
            were there.
    """

    workers: int | tuple[int, int] | None = None
    cpus: int | None = None
    gpus: int | None = None
    threads: int | None = None

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The least and the most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


@dataclasses.dataclass(frozen=True)
class JobHooks:
    """What a run asks and tells the program that started it. All of it is called in that program's process.

    Attributes:
        should_stop: asked after each step (``train.launcher=local``) or twice a second (on Ray). Once it says yes, the
            run stops after its step, with a checkpoint, and its result says ``stopped``.
        on_evaluation: called with each evaluation, once for each step. An error that it raises ends the run.
        parent_run: id of an MLflow run in the same experiment, whose child the run's own MLflow run becomes.
        gets_report: whether it writes a report, as far as `tracking.report` says so. Trials of a search don't.
        budget: what the run may take of the cluster.
        should_abandon: asked as often as ``should_stop``. Once it says yes, the run stops after its step, without a
            checkpoint: what it did since its last one is lost. Its result says ``stopped``.
        hold_evaluated: whether evaluated checkpoints are held: they are not removed, whatever ``train.keep_last`` says,
            until they are released (`release`), because another run may be about to begin at one.
        on_step: told of the steps that rank 0 has taken, about twice a second; in an evaluation, of the batches that
            all workers have done.
    """

    should_stop: Callable[[], bool] = lambda: False
    on_evaluation: Callable[[Evaluated], None] = lambda evaluated: None
    parent_run: str | None = None
    gets_report: bool = True
    budget: Budget = Budget()
    should_abandon: Callable[[], bool] = lambda: False
    hold_evaluated: bool = False
    on_step: Callable[[int], None] = lambda step: None
