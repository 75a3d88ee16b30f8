"""The training loop. It runs on any worker context: alone in a process, or as one of many workers.

Everything that a step depends on (batches, random numbers, learning rate, loss weights) is a function of the step's
number, so that going on from a checkpoint of step ``k`` is the same as never having stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import TYPE_CHECKING, Literal

from detr_ray.engine.context import LeaveReason, WorkerContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.meters import Meters
from detr_ray.engine.optimizer import learning_rate_factor, set_learning_rate
from detr_ray.engine.precision import warn_of_slow_precision
from detr_ray.engine.progress import duration, evaluation_line, step_line
from detr_ray.engine.result import FitResult
from detr_ray.engine.scoring import BackgroundScoring, Scored
from detr_ray.engine.step import StepOutcome, StepTimes, TrainStep
from detr_ray.engine.training_state import MODEL_FILE, TrainingState

if TYPE_CHECKING:  # what reads and writes files is given, so that torch and numpy are enough to train
    from detr_ray.engine.batches import BatchSource
    from detr_ray.engine.checkpoint import CheckpointInfo
    from detr_ray.engine.job import TrainJob
    from detr_ray.tracking import Tracker

logger = logging.getLogger(__name__)

# Epochs of a small data set are short, and a checkpoint after each would take longer than the epoch.
MIN_STEPS_BETWEEN_CHECKPOINTS = 100


class TrainingLoop:
    """One worker's side of a training run.

    Args:
        job: what to train.
        context: this worker's group.
        batches: gives this worker its batches.
        tracker: takes the metrics; only rank 0's is written to.
    """

    def __init__(self, job: TrainJob, context: WorkerContext, batches: BatchSource, tracker: Tracker) -> None:
        config = job.config
        self.job, self.context, self.batches, self.tracker = job, context, batches, tracker
        self.table = ""
        self._store = job.run.checkpoints
        context.enter("starting", 0)
        self.state = TrainingState(job, context)
        self.model, self.optimizer = self.state.model, self.state.optimizer
        self.criterion = job.build_criterion().to(context.device)
        self._lr_factor = learning_rate_factor(
            config.optim.schedule,
            epochs=config.train.epochs,
            step_epochs=config.optim.step_epochs,
            milestones=config.optim.milestones,
            gamma=config.optim.gamma,
            warmup_epochs=config.optim.warmup_epochs,
            min_lr_factor=config.optim.min_lr_factor,
        )
        # Before the model is wrapped: wrapping compares it between workers.
        self._latest, training = self.state.restore(self._store)
        self._train_step = TrainStep(
            self.model,
            self.criterion,
            self.optimizer,
            context,
            num_queries=config.model.num_queries,
            seed=config.run.seed,
            precision=config.train.precision,
            clip_max_norm=config.optim.clip_max_norm,
            channels_last=config.train.channels_last,
            compile_model=config.train.compile,
            skip_bad_images=config.data.on_bad_image == "skip",
            skip_nonfinite=config.train.on_nonfinite == "skip",
        )
        self.state.restore_step(self._train_step, training)
        self._scoring = None if job.data.val is None else BackgroundScoring(job.data, context)
        self._meters = Meters(context, config.train.global_batch_size)
        self._meters.restart(training.get("interval"))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def run(self) -> FitResult:
        """Trains to the end, or until someone asks to stop.

        Raises:
            RunFailed: the run cannot go on.
        """
        started = time.perf_counter()
        leave: LeaveReason | None = None
        status: Literal["finished", "stopped", "nothing to do"] = "finished"
        if self.step >= self.job.total_steps and not self._evaluation_due():
            status = "nothing to do"
        elif self.context.rank == 0:
            warn_of_slow_precision(self.job.config.train.precision, self.context)
        if self._evaluation_due():  # an earlier process died between the checkpoint and its evaluation
            self._evaluate()
        waiting_since = self._wait_for_data()
        for micro_batches in self.batches.train_batches(self.step, self.job.total_steps):
            self._train_step.times.data_wait += time.perf_counter() - waiting_since
            epoch = self.step / self.job.steps_per_epoch
            set_learning_rate(self.optimizer, self._lr_factor.at(epoch))
            self.criterion.at_epoch(epoch)
            outcome = self._train_step(self.step, micro_batches)
            self._after_step(outcome)
            leave = outcome.leave if self.step < self.job.total_steps else None
            if leave or self._checkpoint_due():
                self._save()
            if leave:
                status = "stopped"
                break
            if self._evaluation_due():
                self._evaluate()
            waiting_since = self._wait_for_data()
        self._note_scores(wait=True)
        self.context.enter("leaving", self.step)
        return self._result(status, leave, time.perf_counter() - started)

    def _wait_for_data(self) -> float:
        self.context.enter("waiting for data", self.step)
        return time.perf_counter()

    def _after_step(self, outcome: StepOutcome) -> None:
        config = self.job.config.train
        self._record_stream(outcome)
        if self.state.ema is not None:
            self._train_step.settle()
            if not outcome.skipped:
                self.state.ema.update(self.model)
        self._check_skipped()
        self._meters.add(outcome)
        self.state.step += 1
        if self.step % config.log_every_steps == 0 or self.step == self.job.total_steps or self.step == 1:
            self._log()
            self._note_scores(wait=False)

    def _check_skipped(self, *, settle: bool = False) -> None:
        """Ends a run that skips too much; without ``settle`` the last step is looked at after the next one only."""
        if settle:
            self._train_step.settle()
        if self._train_step.nonfinite_in_a_row > self.job.config.train.max_nonfinite_steps:
            raise RunFailed(
                f"step {self.step}: {self._train_step.nonfinite_in_a_row} updates in a row were left out because "
                "something was not finite, more than train.max_nonfinite_steps; lower optim.lr or use another "
                "train.precision",
                agreed=True,
            )

    def _log(self) -> None:
        self.context.enter("adding up metrics", self.step)
        self._check_skipped(settle=True)
        metrics = self._meters.metrics(self._meters.totals(self._train_step.times))
        self._meters.restart()
        self._train_step.times = StepTimes()
        metrics["train/epoch"] = self.step / self.job.steps_per_epoch
        metrics["optim/lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["optim/lr_backbone"] = self.optimizer.param_groups[1]["lr"]
        for name in ("ce", "bbox", "giou"):
            metrics[f"loss/weight/{name}"] = self.criterion.weights[f"loss_{name}"]
        self.state.num_bad_images += int(metrics["train/bad_images"])
        if self.state.num_bad_images > self.job.config.data.max_bad_images:
            raise RunFailed(
                f"step {self.step}: {self.state.num_bad_images} images could not be read, more than "
                "data.max_bad_images; `python -m detr_ray.check ... --decode` lists them",
                agreed=True,
            )
        if self.context.rank == 0:
            self.tracker.log_metrics(metrics, self.step)
            self.context.say(step_line(metrics, self.step, self.job.total_steps, self.job.steps_per_epoch))

    def _at_epoch_end(self) -> bool:
        return self.step > 0 and (self.step % self.job.steps_per_epoch == 0 or self.step >= self.job.total_steps)

    def _checkpoint_due(self) -> bool:
        every = self.job.config.train.checkpoint_every_steps
        if self.step >= self.job.total_steps or (every is not None and self.step % every == 0):
            return True
        since = self.step - (0 if self._latest is None else self._latest.step)
        return self._at_epoch_end() and (self._evaluation_due() or since >= MIN_STEPS_BETWEEN_CHECKPOINTS)

    def _evaluation_due(self) -> bool:
        if self._scoring is None or not self._at_epoch_end():
            return False
        if self._latest is not None and self._latest.step == self.step and self._latest.metrics is not None:
            return False
        epoch = self.step // self.job.steps_per_epoch
        every = self.job.config.eval.every_epochs
        return self.step >= self.job.total_steps or (every > 0 and epoch % every == 0)

    def _evaluate(self) -> None:
        """Finds objects with the weights as they are now; what was found is scored while training goes on."""
        assert self._scoring is not None
        self._note_scores(wait=True)
        model = self.model if self.state.ema is None else self.state.ema.module
        self._scoring.begin(model, self.batches.evaluation_batches(), self.step)

    def _note_scores(self, *, wait: bool) -> None:
        """Notes the numbers of the last evaluation in its checkpoint, if they are there and were not noted yet.

        It comes before the next checkpoint at the latest: the newest one is then the only one whose numbers may be
        missing, is not removed meanwhile, and is evaluated again by who goes on from it.
        """
        found = None if self._scoring is None else self._scoring.collect(self.step, self._note, wait=wait)
        if found is None:
            return
        step, metrics = found
        if self._latest is not None and self._latest.step == step:
            self._latest = dataclasses.replace(self._latest, metrics=metrics)
        self.context.report(metrics)

    def _note(self, scored: Scored) -> None:
        """Rank 0's records of an evaluation."""
        self.table = scored.scores.table()
        self.tracker.log_metrics(scored.metrics, scored.step)
        epoch = scored.step / self.job.steps_per_epoch
        tables = f"{self.table}\n\n{scored.scores.category_table()}\n"
        self.tracker.log_text(tables, f"evaluation/epoch_{epoch:07.2f}.txt")
        if self._latest is not None and self._latest.step == scored.step:
            self._store.annotate(self._latest, {k: v for k, v in scored.metrics.items() if k.count("/") == 1})
        best = self._store.prune(self.job.config.train.keep_last)
        is_best = best is not None and best.step == scored.step
        self.context.say(evaluation_line(scored.metrics, epoch, is_best))
        if best is not None and is_best and self.job.run.local_path is not None:
            self.tracker.log_file(f"{best.path}/{MODEL_FILE}", "checkpoints/best")

    def _save(self) -> None:
        """Writes a checkpoint of this step (rank 0).

        A checkpoint that can't be written (a full disk) costs no run: the last good one stays good, training goes on
        and tries again at the next one. Only the last of a run has to succeed.
        """
        self._note_scores(wait=True)
        self._check_skipped(settle=True)
        self.context.enter("writing a checkpoint", self.step)
        self.state.average_running_statistics()
        written: tuple[CheckpointInfo | None, str] = (None, "")
        if self.context.rank == 0:
            written = self._write_checkpoint()
        self.context.enter("waiting for the checkpoint", self.step)
        info, problem = self.context.gather(written)[0]
        if info is not None:
            self._latest = info
        elif self.step >= self.job.total_steps:
            raise RunFailed(f"the last checkpoint could not be written: {problem}", agreed=True)

    def _write_checkpoint(self) -> tuple[CheckpointInfo | None, str]:
        details = {
            "epoch": self.step / self.job.steps_per_epoch,
            "world_size": self.context.world_size,
            "global_batch_size": self.job.config.train.global_batch_size,
        }
        started = time.perf_counter()
        try:
            info = self._store.save(self.step, self.state.files(self._train_step), details)
        except OSError as error:
            self.context.say(f"WARNING: no checkpoint at step {self.step}: {error}")
            return None, str(error)
        self._store.prune(self.job.config.train.keep_last)
        logger.info("checkpoint of step %d in %.2f s", self.step, time.perf_counter() - started)
        return info, ""

    def _record_stream(self, outcome: StepOutcome) -> None:
        folder = self.job.run.local_path
        if not self.job.config.train.record_stream or folder is None:
            return
        path = folder / "stream" / f"rank-{self.context.rank:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        line = {
            "step": self.step,
            "world_size": self.context.world_size,
            "positions": outcome.positions,
            "image_ids": outcome.image_ids,
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _result(
        self, status: Literal["finished", "stopped", "nothing to do"], leave: LeaveReason | None, seconds: float
    ) -> FitResult:
        best = self._store.best()
        if status == "finished" and self.context.rank == 0 and self._latest is not None and self.job.run.local_path:
            self.tracker.log_file(f"{self._latest.path}/{MODEL_FILE}", "checkpoints/last")
        logger.info("loop ended (%s) after %s", status, duration(seconds))
        return FitResult(
            run_name=self.job.run.name,
            run_path=self.job.run.path,
            status=status,
            step=self.step,
            metrics=dict((self._latest.metrics if self._latest else None) or {}),
            best_metrics=dict((best.metrics if best else None) or {}),
            best_checkpoint=best.path if best else None,
            table=self.table,
            train_s=seconds,
            leave=leave,
        )
