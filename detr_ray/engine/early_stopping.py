"""Early stopping: a run ends once its validations have not got better for a while.

Whether and after which step a run ends depends only on the scores, not on when they are computed: the run waits for the
scores of an evaluation that may be its last one. It waits for no other scores. They are kept in the run's folder, so a
resumed run counts as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from detr_ray.coco_numbers import COCO_METRICS
from detr_ray.config import Config, ConfigError
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.errors import RunFailed
from detr_ray.printable import counted
from detr_ray.retries import reason_of

if TYPE_CHECKING:  # see the loop
    from detr_ray.engine.checkpoints.evaluation_scores import Scores
    from detr_ray.engine.job import TrainJob


class EarlyStopping:
    """Counts the evaluations since the best one.

    Args:
        patience: evaluations in a row without a better score that end the run.
        min_delta: what a score must exceed the best one before by, to be better.
        metric: name of the score. Evaluations without it do not count.
        scores: of the evaluations so far.

    Attributes:
        scores: of all evaluations.
    """

    def __init__(self, patience: int, min_delta: float, metric: str, scores: Scores) -> None:
        self._patience, self._min_delta, self._metric = patience, min_delta, metric
        self.scores = dict(scores)

    @classmethod
    def of(cls, job: TrainJob, context: WorkerContext, step: int) -> EarlyStopping | None:
        """The early stopping of a run; None if it is not configured. Every worker must call it.

        Args:
            job: the run.
            context: this worker's group.
            step: the step at which training resumes; scores of later steps are dropped.

        Raises:
            RunFailed: the scores cannot be read.
        """
        section = job.config.train.early_stopping
        if section is None or job.data.val is None:
            return None
        found: Scores = {}
        problem = ""
        if context.rank == 0:
            from detr_ray.engine.checkpoints.evaluation_scores import read_scores

            try:
                found = read_scores(job.run.path, job.data.measured_on)
            except OSError as error:
                problem = f"run.storage: the scores of the run so far cannot be read: {reason_of(error)}"
        found, problem = context.broadcast((found, problem))
        if problem:
            raise RunFailed(problem, agreed=True)
        known = {of: scores for of, scores in found.items() if of <= step}
        return cls(section.patience, section.min_delta, section.metric, known)

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes what an evaluation gave."""
        self.scores[step] = dict(scores)

    @property
    def next_may_be_last(self) -> bool:
        """Whether one more evaluation without a better score ends the run."""
        return self._state()[2] + 1 >= self._patience

    def verdict(self, steps_per_epoch: int) -> str:
        """Why the run ends; empty while it goes on."""
        best_step, best, since = self._state()
        if since < self._patience:
            return ""
        more = f" by more than {self._min_delta:g}" if self._min_delta else ""
        return (
            f"{self._metric} has not risen{more} above {best:.4f}, which it had at epoch "
            f"{best_step / steps_per_epoch:g}, in {counted(since, 'validation')} (train.early_stopping)"
        )

    def _state(self) -> tuple[int, float, int]:
        """Step and value of the best score, and the number of evaluations since."""
        best_step, best, since = 0, float("-inf"), 0
        for step, scores in sorted(self.scores.items()):
            value = scores.get(self._metric)
            if value is None:
                continue
            if value > best + self._min_delta:
                best_step, best, since = step, value, 0
            else:
                since += 1
        return best_step, best, since


def refuse_unknown_score(config: Config, class_names: Iterable[str | None]) -> None:
    """Refuses early stopping by a score that evaluations do not give.

    Args:
        config: the configuration.
        class_names: the classes; None for labels without one.

    Raises:
        ConfigError: there is no such score; the message names those that exist.
    """
    section = config.train.early_stopping
    if section is None:
        return
    classes = [name for name in class_names if name is not None]
    if section.metric not in COCO_METRICS and section.metric not in {f"val/AP/{name}" for name in classes}:
        raise ConfigError(
            f"train.early_stopping.metric: validations give no {section.metric}; there are {', '.join(COCO_METRICS)}, "
            f"and val/AP/NAME for a class ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
        )
