"""Scoring beside training: another process scores what was found on the validation set while the next steps are taken.

The scores belong to the step whose weights were evaluated, whenever they are there: they are the same numbers, noted
under the same step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from detr_ray.engine.context import WorkerContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.evaluator import build_evaluator
from detr_ray.evaluation import CocoMetrics, DetectionTable, ScoringFailed
from detr_ray.structures import PaddedBatch

if TYPE_CHECKING:
    from detr_ray.engine.planned_data import PlannedData


@dataclass(frozen=True)
class Scored:
    """An evaluation whose scores are there.

    Attributes:
        step: optimizer steps that its weights had taken.
        metrics: the numbers under the names they are tracked by, and ``val/seconds``: detecting and scoring.
        scores: the numbers as the evaluator gave them.
    """

    step: int
    metrics: dict[str, float]
    scores: CocoMetrics


@dataclass(frozen=True)
class _Pending:
    step: int
    future: Future[Scored] | None  # rank 0's; the others only know that there is one


class BackgroundScoring:
    """One worker's side of evaluations that are scored on rank 0, one at a time.

    Args:
        data: has a validation set.
        context: this worker's group.
    """

    def __init__(self, data: PlannedData, context: WorkerContext) -> None:
        self._evaluator = build_evaluator(data, context)
        self._context = context
        self._limit_s = data.config.train.stall_timeout_s
        self._pending: _Pending | None = None

    def begin(self, model: nn.Module, batches: Iterator[PaddedBatch], step: int) -> None:
        """Finds what the model finds and begins to score it; every worker must call it, after `collect`."""
        assert self._pending is None, "the scores of the evaluation before are noted first"
        started = time.perf_counter()
        detections = self._evaluator.find(model, batches, step)
        seconds = time.perf_counter() - started
        future = None if detections is None else self._score(detections, seconds, step)
        self._pending = _Pending(step, future)

    def collect(self, step: int, note: Callable[[Scored], None], *, wait: bool) -> tuple[int, dict[str, float]] | None:
        """Notes the scores if they are there; every worker must call it at the same step and learns the same.

        Args:
            step: where training is now.
            note: takes the scores on rank 0, before any worker goes on.
            wait: until they are there.

        Returns:
            The step they belong to and the metrics; None while there is nothing to note.

        Raises:
            RunFailed: scoring failed, or took too long.
        """
        if self._pending is None:
            return None
        metrics: dict[str, float] | None = None
        problem = ""
        future = self._pending.future
        if future is not None and (wait or future.done()):
            self._context.enter("scoring", step)
            try:
                scored = future.result()
            except TimeoutError:
                problem = f"it takes more than train.stall_timeout_s={self._limit_s} seconds"
            except ScoringFailed as error:
                problem = str(error)
            else:
                note(scored)
                metrics = scored.metrics
        self._context.enter("waiting for the scores", step)
        metrics, problem = self._context.gather((metrics, problem))[0]
        if problem:
            raise RunFailed(f"the evaluation of step {self._pending.step} could not be scored: {problem}", agreed=True)
        if metrics is None:
            return None
        evaluated, self._pending = self._pending.step, None
        return evaluated, metrics

    def _score(self, detections: DetectionTable, detecting_s: float, step: int) -> Future[Scored]:
        future: Future[Scored] = Future()

        def run() -> None:  # waits for the other process
            started = time.perf_counter()
            try:
                scores = self._evaluator.score_apart(detections, self._limit_s)
                seconds = detecting_s + time.perf_counter() - started
                future.set_result(Scored(step, scores.as_metrics("val/") | {"val/seconds": seconds}, scores))
            except BaseException as error:  # raised again by who asks for the scores
                future.set_exception(error)

        threading.Thread(target=run, name="scoring", daemon=True).start()
        return future
