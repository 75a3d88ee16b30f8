"""Scoring beside training: another process scores the detections while training goes on.

The scores are noted under the step whose weights were evaluated, no matter when they are ready. A failure of the scorer
process affects neither training nor checkpoints: scoring is tried once more and then given up. If it still runs when
the workers leave, it is cancelled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from detr_ray.engine.context import LeaveReason, WorkerContext, most_urgent
from detr_ray.engine.validation.evaluator import Evaluator, build_evaluator
from detr_ray.evaluation import CocoMetrics, DetectionTable, ScorerProcess, ScoringFailed
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.structures import PaddedBatch

if TYPE_CHECKING:
    from detr_ray.engine.stream.planned_data import PlannedData

logger = logging.getLogger(__name__)

ATTEMPTS = 2
LIMIT_S, LIMIT_OF_A_DETECTION_S = 60.0, 0.001
"""An attempt may take a minute, and a millisecond for each detection, which is 500 times as long as on a free core; but
no longer than ``train.stall_timeout_s``."""
POLL_S = 0.5
QUIET_S = 5.0
"""After waiting this long, it is checked whether the workers are to leave."""


@dataclass(frozen=True)
class Scored:
    """An evaluation whose scoring has ended.

    Attributes:
        step: optimizer steps that its weights had taken.
        metrics: the numbers under the names they are tracked by, and ``val/seconds``: detecting and scoring. Empty
            where scoring failed.
        scores: the numbers as the evaluator gave them; None where scoring failed.
        problem: why it failed.
        detections: the detections; on rank 0, if there are scores.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    scores: CocoMetrics | None = None
    problem: str = ""
    detections: DetectionTable | None = None


class BackgroundScoring:
    """One worker's side of evaluations that are scored on rank 0, one at a time.

    Args:
        data: has a validation set.
        context: this worker's group.
        class_loss: of the models; says what their logits mean.
    """

    def __init__(self, data: PlannedData, context: WorkerContext, class_loss: ClassLoss) -> None:
        self._evaluator = build_evaluator(data, context, class_loss)
        self._context = context
        self._stall_timeout_s = data.config.train.stall_timeout_s
        self._task: _ScoringTask | None = None  # rank 0's; the others only know that there is one
        self._step: int | None = None
        self._known_bad: set[int] = set()

    @property
    def pending(self) -> bool:
        """Whether scores are still to come; the same on every worker."""
        return self._step is not None

    def begin(self, model: DetectionModel, batches: Iterator[PaddedBatch], step: int) -> None:
        """Runs the model and starts scoring its detections. Every worker must call it, while nothing is pending."""
        assert not self.pending, "the scores of the evaluation before are noted first"
        started = time.perf_counter()
        detections = self._evaluator.find(model, batches, step)
        if detections is not None:
            known = {"val/seconds": time.perf_counter() - started}
            if self._evaluator.bad_images:
                known["val/bad_images"] = float(len(self._evaluator.bad_images))
            limit_s = min(LIMIT_S + LIMIT_OF_A_DETECTION_S * len(detections), self._stall_timeout_s)
            self._task = _ScoringTask(self._evaluator, detections, known, step, limit_s)
        self._step = step

    def new_bad_images(self) -> list[str]:
        """A line for each image that could be read in earlier evaluations, but not in the last one."""
        lines = [line for image_id, line in self._evaluator.bad_images.items() if image_id not in self._known_bad]
        self._known_bad |= self._evaluator.bad_images.keys()
        return lines

    def collect(self, step: int, note: Callable[[Scored], None]) -> Scored | None:
        """Notes the scores if they are ready. Every worker must call it at the same step; all get the same result.

        Args:
            step: where training is now.
            note: takes the scores on rank 0, before any worker goes on.

        Returns:
            The result of scoring, with its ``scores`` on rank 0 only; None if it is not ready, or nothing is pending.
        """
        if not self.pending:
            return None
        self._context.enter("waiting for the scores", step)
        done = self._task is not None and self._task.done.is_set()
        return self._collect_if(self._sums(done)[0] > 0, step, note)

    def wait(self, step: int, note: Callable[[Scored], None]) -> tuple[Scored | None, LeaveReason | None]:
        """Like `collect`, but waits until scoring has ended or the workers are to leave.

        Returns:
            The result of scoring, and why the workers are to leave; both the same on every worker.
        """
        began = time.monotonic()
        while self.pending:
            self._context.enter("scoring" if self._task is not None else "waiting for the scores", step)
            done = self._task is not None and self._task.wait(POLL_S)
            # Only after a while: usually this is asked once a step, and most waits are short.
            reason = self._context.leave_reason() if time.monotonic() - began > QUIET_S else None
            ended, leaving = self._sums(done, reason is not None)
            found = self._collect_if(ended > 0, step, note)
            if found is not None:
                return found, None
            if leaving:
                return None, most_urgent(self._context.gather(reason))
        return None, None

    def drop(self) -> None:
        """Ends the scorer process and drops what is pending; the process that resumes the run evaluates again."""
        if self._task is not None:
            self._task.drop()
        self._task = self._step = None

    def _sums(self, *values: bool) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)  # of the host, so that nothing waits for the device
        return self._context.all_reduce_sum(numbers).tolist()

    def _collect_if(self, ended: bool, step: int, note: Callable[[Scored], None]) -> Scored | None:
        if not ended:
            return None
        found: Scored | None = None
        if self._task is not None:
            self._context.enter("scoring", step)
            found = self._task.outcome
            note(found)
        self._context.enter("waiting for the scores", step)
        told = self._context.broadcast(None if found is None else (found.step, found.metrics, found.problem))
        self._task = self._step = None
        assert told is not None, "rank 0 has the task"
        return found or Scored(told[0], told[1], None, told[2])


class _ScoringTask:
    """Scores in the background: starts the scorer process, waits for it, and starts it once more where it fails."""

    def __init__(
        self, evaluator: Evaluator, detections: DetectionTable, known: dict[str, float], step: int, limit_s: float
    ) -> None:
        self._evaluator, self._detections = evaluator, detections
        self._known, self._step, self._limit_s = known, step, limit_s
        self._process: ScorerProcess | None = None
        self._dropped = False
        self._lock = threading.Lock()
        # Starting the process has no time limit of its own; it may hang on a disk that does not answer.
        self._give_up_at = time.monotonic() + ATTEMPTS * (limit_s + 30)
        self.done = threading.Event()
        self.outcome = Scored(step, problem="it did not begin in time")
        threading.Thread(target=self._run, name="scoring", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits a moment; returns whether scoring has ended or has taken too long."""
        return self.done.wait(seconds) or time.monotonic() > self._give_up_at

    def drop(self) -> None:
        """Ends the process without a result."""
        with self._lock:
            self._dropped = True
            if self._process is not None:
                self._process.end()

    def _run(self) -> None:
        started, problems = time.perf_counter(), []
        for _ in range(ATTEMPTS):
            try:
                scores = self._attempt()
            except ScoringFailed as error:
                problems.append(str(error))
            except Exception as error:
                logger.exception("scoring failed")  # any error: only the scores are lost
                problems.append(f"{type(error).__name__}: {error}")
            else:
                known = self._known | {"val/seconds": self._known["val/seconds"] + time.perf_counter() - started}
                metrics = scores.as_metrics("val/") | known
                self.outcome = Scored(self._step, metrics, scores, detections=self._detections)
                break
            if self._dropped:
                break
            self.outcome = Scored(self._step, problem="; then: ".join(dict.fromkeys(problems)))
        self.done.set()

    def _attempt(self) -> CocoMetrics:
        process = self._evaluator.start_scoring(self._detections)
        with self._lock:
            self._process = process
            if self._dropped:
                process.end()
        return process.result(self._limit_s)
