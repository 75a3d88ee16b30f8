"""The evaluations of a training run: when one is due, of which weights, and where its numbers are recorded.

An evaluation belongs to a checkpoint, which notes that it is due (`CheckpointInfo.evaluation_due`) and is kept until it
is scored. If the evaluation is interrupted, because its process died or was asked to leave, the process that resumes
the run repeats it with the weights of that checkpoint.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from detr_ray.addresses import join
from detr_ray.detector.artifact import MODEL_FILE, SCORES_FILE
from detr_ray.engine.checkpoints.info import MANIFEST, CheckpointInfo, manifest_text
from detr_ray.engine.checkpoints.run_checkpoints import Inessential, RunCheckpoints
from detr_ray.engine.checkpoints.training_state import TrainingState
from detr_ray.engine.context import LeaveReason, WorkerContext
from detr_ray.engine.early_stopping import EarlyStopping
from detr_ray.engine.errors import CheckpointError
from detr_ray.engine.hooks import Evaluated
from detr_ray.engine.reporting.progress import evaluation_line
from detr_ray.engine.validation.scoring import BackgroundScoring, Scored
from detr_ray.evaluation import DetectionTable, GroundTruth
from detr_ray.tracking.store import BEST_CHECKPOINT

if TYPE_CHECKING:  # see the loop
    from detr_ray.engine.job import TrainJob
    from detr_ray.engine.stream.batches import BatchSource
    from detr_ray.model import DetectionModel
    from detr_ray.tracking import Tracker


class Validation:
    """One worker's side of a run's evaluations.

    Args:
        job: the run; without a validation set nothing is ever due.
        context: this worker's group.
        state: the run's state, whose weights are evaluated.
        checkpoints: store the numbers.
        batches: gives this worker its share of the validation set.
        tracker: takes the numbers; only rank 0's is written to.
        inessential: guards the writing of records.

    Attributes:
        metrics: what the last evaluation gave; the same on all workers.
        table: the same for people, on rank 0.
    """

    def __init__(
        self,
        job: TrainJob,
        context: WorkerContext,
        state: TrainingState,
        checkpoints: RunCheckpoints,
        batches: BatchSource,
        tracker: Tracker,
        inessential: Inessential,
    ) -> None:
        self._job, self._context, self._state, self._checkpoints = job, context, state, checkpoints
        self._batches, self._tracker, self._inessential = batches, tracker, inessential
        self._scoring = (
            None if job.data.val is None else BackgroundScoring(job.data, context, state.criterion.class_loss)
        )
        latest = checkpoints.latest
        self.metrics: dict[str, float] = dict((latest.metrics if latest else None) or {})
        self.table = ""
        self._left_out: LeaveReason | None = None  # why the last evaluation was not begun
        self._early_stopping = EarlyStopping.of(job, context, state.step)

    def falls_on(self, step: int) -> bool:
        """Whether the weights after so many steps are to be evaluated."""
        at_end = step >= self._job.total_steps
        if self._scoring is None or step == 0 or not (at_end or step % self._job.steps_per_epoch == 0):
            return False
        every = self._job.config.eval.every_epochs
        return at_end or (every > 0 and step // self._job.steps_per_epoch % every == 0)

    @property
    def verdict(self) -> str:
        """Why the run ends before its last step; empty while it goes on. The same on every worker."""
        return "" if self._early_stopping is None else self._early_stopping.verdict(self._job.steps_per_epoch)

    def unscored(self) -> list[CheckpointInfo]:
        """The checkpoints of an earlier process that are still to be evaluated; the same on every worker."""
        if self._scoring is None:
            return []
        found, latest = self._checkpoints.unscored(), self._checkpoints.latest
        if latest is None or latest.metrics is not None or latest.evaluation_problem or latest.evaluation_due:
            return found
        # Written by an earlier release that did not note it, or without a validation set.
        return [*found, latest] if self.falls_on(latest.step) else found

    def make_up(self, unscored: Sequence[CheckpointInfo]) -> LeaveReason | None:
        """Repeats missing evaluations of an earlier process; training goes on while the last one is scored.

        Returns:
            See `begin`.
        """
        for info in unscored:
            model = self._current if info.step == self._state.step else self._model_of(info)
            if model is not None and (reason := self._begin(model, info.step)) is not None:
                return reason if self._early_stopping is not None else None
        return self._await_decision()

    def begin(self) -> LeaveReason | None:
        """Runs the present weights over the validation set; the detections are scored while training goes on.

        Waits for the scores of the previous evaluation first. If the workers are to leave meanwhile, it does nothing,
        and the evaluation stays due. With early stopping, it waits for scores that may end the run.

        Returns:
            With early stopping, the reason to leave, if one came while waiting; otherwise None. None after the last
            step, where `finish` waits for the scores.
        """
        self._left_out = self._begin(self._current, self._state.step)
        at_end = self._state.step >= self._job.total_steps
        while self._left_out == "resized" and at_end:
            self._left_out = self._begin(self._current, self._state.step)
        return None if at_end or self._early_stopping is None else self._left_out or self._await_decision()

    def _await_decision(self) -> LeaveReason | None:
        scoring, rule = self._scoring, self._early_stopping
        if scoring is None or rule is None or not scoring.pending or not rule.next_may_be_last:
            return None
        return self._wait(scoring)

    def collect(self) -> None:
        """Notes the numbers of the last evaluation if they have been computed."""
        if self._scoring is not None:
            self._learn(self._scoring.collect(self._state.step, self._note))

    def finish(self) -> LeaveReason | None:
        """Waits for the last numbers. Returns a reason to leave before they are there, unless it is a resize."""
        reason = self._left_out if self._state.step >= self._job.total_steps else None
        while self._scoring is not None and self._scoring.pending and reason in (None, "resized"):
            reason = self._wait(self._scoring)
        return None if reason == "resized" else reason

    def drop(self) -> None:
        """Cancels a running evaluation; `make_up` of the next process repeats it."""
        if self._scoring is not None:
            self._scoring.drop()

    @property
    def _current(self) -> DetectionModel:
        return self._state.model if self._state.ema is None else self._state.ema.module

    def _begin(self, model: DetectionModel, step: int) -> LeaveReason | None:
        """Begins an evaluation when the previous one is scored; returns a reason to leave that comes before."""
        assert self._scoring is not None
        reason = self._wait(self._scoring)
        if reason is not None:
            return reason
        with self._state.statistics.averaged():
            self._scoring.begin(model, self._batches.evaluation_batches(), step)
        if self._context.rank == 0:
            for line in self._scoring.new_bad_images():
                self._context.say(f"WARNING: validation image left out, counts as without detections: {line}")
        return None

    def _wait(self, scoring: BackgroundScoring) -> LeaveReason | None:
        found, reason = scoring.wait(self._state.step, self._note)
        self._learn(found)
        return reason

    def _learn(self, found: Scored | None) -> None:
        if found is not None and found.metrics:
            self.metrics = found.metrics
            if self._early_stopping is not None:
                self._early_stopping.note(found.step, found.metrics)
            path = self._checkpoints.path_of(found.step)
            self._context.report(Evaluated(found.step, found.metrics, path))

    def _note(self, scored: Scored) -> None:
        """Rank 0's records of an evaluation."""
        if scored.scores is None:
            self._context.say(
                f"WARNING: the evaluation of step {scored.step} has no scores, they could not be computed: "
                f"{scored.problem}; training goes on"
            )
            self._checkpoints.note(scored.step, None, scored.problem)
            return
        epoch = scored.step / self._job.steps_per_epoch
        self.table = scored.scores.table()
        self._keep_scores(scored)  # before the numbers: a checkpoint that has its numbers may be removed
        with self._inessential("scores cannot be recorded"):
            self._tracker.log_metrics(scored.metrics, scored.step)
            self._tracker.log_text(scored.scores.all_tables(), f"evaluation/epoch_{epoch:07.2f}.txt")
        self._keep(scored)
        self._checkpoints.note(scored.step, {name: scored.metrics[name] for name in scored.metrics if _is_kept(name)})
        best = self._checkpoints.best
        is_best = best is not None and best.step == scored.step
        self._context.say(evaluation_line(scored.metrics, epoch, is_best))
        if best is not None and is_best:
            with self._inessential("the best checkpoint cannot be recorded"):
                self._record_best(best, has_scores=bool(scored.scores.scores))
            if scored.detections is not None and self._job.config.tracking.report:
                with self._inessential("what the best weights found cannot be kept for the report"):
                    self._keep_found(scored.step, scored.detections)

    def _record_best(self, best: CheckpointInfo, has_scores: bool) -> None:
        """Stores the model of the best checkpoint, and what is known of it, as artifacts of the MLflow run.

        The manifest has the hash of the model file and the numbers, and says which run they are from.
        """
        run = self._job.run
        origin = {"run": run.path, "run_id": run.run_id, "fingerprints": self._job.data.fingerprints}
        model = replace(best, files={MODEL_FILE: best.files[MODEL_FILE]}, details={**best.details, "origin": origin})
        self._tracker.log_file(join(best.path, MODEL_FILE), BEST_CHECKPOINT)
        if has_scores:
            self._tracker.log_file(join(best.path, SCORES_FILE), BEST_CHECKPOINT)
        self._tracker.log_text(manifest_text(model), f"{BEST_CHECKPOINT}/{MANIFEST}")

    def _keep_found(self, step: int, detections: DetectionTable) -> None:
        """Keeps the detections of the best weights, for the report."""
        from detr_ray.engine.past_run import keep_best_found  # it writes files; see the loop

        assert self._job.data.val is not None
        keep_best_found(self._job.run.path, step, GroundTruth.from_columns(self._job.data.val), detections)

    def _keep(self, scored: Scored) -> None:
        """Writes the scores to the run's folder before they are noted in the checkpoint. Without the note, the
        checkpoint would be evaluated again.
        """
        if self._early_stopping is None:
            return
        from detr_ray.engine.checkpoints.evaluation_scores import write_scores

        self._early_stopping.note(scored.step, scored.metrics)
        with self._inessential("scores cannot be kept for train.early_stopping (it is tried again)"):
            write_scores(self._job.run.path, self._job.data.measured_on, self._early_stopping.scores)

    def _keep_scores(self, scored: Scored) -> None:
        """Rank 0: writes the score quality of the evaluated weights into their checkpoint."""
        assert scored.scores is not None
        path = self._checkpoints.path_of(scored.step)
        if path is not None and scored.scores.scores:
            content = {"measured_on": self._job.data.measured_on, **scored.scores.scores}
            with self._inessential("what scores mean cannot be kept with the checkpoint"):
                self._checkpoints.store.write_beside(path, SCORES_FILE, json.dumps(content).encode())

    def _model_of(self, info: CheckpointInfo) -> DetectionModel | None:
        """The evaluated model, read from its checkpoint; None if the checkpoint cannot be read."""
        state: Mapping[str, Tensor] = {}
        problem = ""
        if self._context.rank == 0:
            try:
                content = self._checkpoints.store.load(info, MODEL_FILE)
                state = content["model"] if self._state.ema is None else content["ema"]
            except CheckpointError as error:
                problem = str(error)
                self._checkpoints.note(info.step, None, problem)
            except OSError as error:  # the next process tries again
                problem = str(error)
        problem = self._context.broadcast(problem)
        if problem:
            if self._context.rank == 0:
                self._context.say(f"WARNING: the checkpoint of step {info.step} cannot be evaluated: {problem}")
            return None
        model = copy.deepcopy(self._current)
        model.load_state_dict(self._context.broadcast(state))
        return model


def _is_kept(metric: str) -> bool:
    """Whether a checkpoint keeps a number of its evaluation: all that a search may compare (`tune.metric`)."""
    return metric.count("/") == 1 or metric.startswith("val/AP/")
