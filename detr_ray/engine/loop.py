"""The training loop. It runs in any worker context: as a single process, or as one of many workers.

Everything that a step depends on (batches, random numbers, learning rate, loss weights) is a function of the step's
number, so a run that resumes from a checkpoint of step ``k`` computes the same as one that never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from detr_ray.addresses import join
from detr_ray.detector.artifact import MODEL_FILE
from detr_ray.engine.checkpoints.run_checkpoints import BRIEFLY, ONCE, PATIENTLY, Inessential, RunCheckpoints
from detr_ray.engine.checkpoints.training_state import TrainingState
from detr_ray.engine.context import LeaveReason, WorkerContext
from detr_ray.engine.cpu import HeldMemory, warn_of_slow_precision
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.micro_batches import micro_batch_size
from detr_ray.engine.reporting.meters import Meters, StreamRecord
from detr_ray.engine.reporting.progress import FitResult, duration, step_line
from detr_ray.engine.training_step.optimizer import LearningRates, rates_in_use
from detr_ray.engine.training_step.step import StepOutcome, StepTimes, TrainStep
from detr_ray.engine.validation.in_training import Validation

if TYPE_CHECKING:  # the loop gets what reads and writes files, so that training needs only torch and numpy
    from detr_ray.engine.job import TrainJob
    from detr_ray.engine.stream.batches import BatchSource
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
        self.inessential = Inessential(context.say)
        self.checkpoints = RunCheckpoints(
            job.run.checkpoints, context, config.train.keep_last, self.inessential, job.data.measured_on
        )
        self._bad_since: list[int] = []
        stream = job.run.local_path if config.train.record_stream else None
        self._stream_record = StreamRecord(stream, context, self.inessential)
        context.enter("starting", 0)
        self.state = TrainingState(job, context)
        self.model, self.criterion, self.optimizer = self.state.model, self.state.criterion, self.state.optimizer
        self._rates = LearningRates.of(self.model, config.optim, config.train.epochs)
        # Before the model is wrapped, which compares the models of all workers.
        training = self.state.restore(self.checkpoints)
        if config.train.micro_batch_size == "auto" and self.step < job.total_steps:
            batches.limit_micro_batches(micro_batch_size(job, context, self.state))
        self._train_step = TrainStep(
            self.model,
            self.criterion,
            self.optimizer,
            context,
            seed=config.run.seed,
            precision=config.train.precision,
            clip_max_norm=config.optim.clip_max_norm,
            channels_last=config.train.channels_last,
            compile_model=config.train.compile,
            skip_bad_images=config.data.on_bad_image == "skip",
            skip_nonfinite=config.train.on_nonfinite == "skip",
        )
        self.state.restore_step(self._train_step, training)
        self.validation = Validation(job, context, self.state, self.checkpoints, batches, tracker, self.inessential)
        self._memory = HeldMemory()
        self._meters = Meters(context, config.train.global_batch_size)
        self._meters.restart(training.get("interval"))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def run(self) -> FitResult:
        """Trains to the end, or until it is asked to stop.

        Raises:
            RunFailed: the run cannot go on.
        """
        started = time.perf_counter()
        unscored = self.validation.unscored()
        status: Literal["finished", "stopped", "nothing to do"] = "finished"
        if (self.step >= self.job.total_steps or self.validation.verdict) and not unscored:
            status = "nothing to do"
        elif self.context.rank == 0:
            warn_of_slow_precision(self.job.config.train.precision, self.context)
        try:
            leave = self.validation.make_up(unscored) or self._train() or self.validation.finish()
        finally:
            self.validation.drop()
        self.context.enter("leaving", self.step)
        return self._result("stopped" if leave else status, leave, time.perf_counter() - started)

    def _train(self) -> LeaveReason | None:
        """Takes the remaining steps. Returns the reason to leave, if there was one before the last step."""
        if self.validation.verdict:
            return None
        waiting_since = self._wait_for_data()
        for micro_batches in self.batches.train_batches(self.step, self.job.total_steps):
            self._train_step.times.data_wait += time.perf_counter() - waiting_since
            epoch = self.step / self.job.steps_per_epoch
            self._rates.set(self.optimizer, epoch)
            self.criterion.at_epoch(epoch)
            outcome = self._train_step(self.step, micro_batches)
            self._after_step(outcome)
            leave = outcome.leave if self.step < self.job.total_steps else None
            if leave:
                if leave != "abandoned":
                    self.validation.collect()
                    self.validation.drop()
                    self._save(BRIEFLY)
                return leave
            if self._checkpoint_due():
                self._save(PATIENTLY if self.step >= self.job.total_steps else ONCE)
            if self.validation.falls_on(self.step):
                leave = self.validation.begin()
                ends = self.step < self.job.total_steps and bool(self.validation.verdict)
                if ends:
                    self._end_early()
                if leave and leave != "abandoned":
                    self._save_unless_saved(BRIEFLY)
                if leave or ends:
                    return leave
            waiting_since = self._wait_for_data()
        return None

    def _save_unless_saved(self, pauses: Sequence[float]) -> None:
        """Writes the checkpoint of this step if that failed before."""
        if self.checkpoints.latest is None or self.checkpoints.latest.step < self.step:
            self._save(pauses)

    def _end_early(self) -> None:
        self._save_unless_saved(PATIENTLY)
        if self.step % self.job.config.train.log_every_steps:
            self._log()

    def _wait_for_data(self) -> float:
        self.context.enter("waiting for data", self.step)
        return time.perf_counter()

    def _after_step(self, outcome: StepOutcome) -> None:
        config = self.job.config.train
        self._stream_record.add(self.step, outcome)
        if self.state.ema is not None:
            self._train_step.settle()
            if not outcome.skipped:
                self.state.ema.update(self.model)
        self._check_skipped()
        self._meters.add(outcome)
        self._bad_since += outcome.bad_image_ids
        self.state.step += 1
        if self.context.device.type == "cpu":
            self._memory.after_step()
        ends_interval = self.step % config.log_every_steps == 0 or self.step == 1
        if ends_interval or self.step == self.job.total_steps:
            self._log()
            self.validation.collect()
        if ends_interval:  # an interval that the end of the run cuts short continues if the run is resumed
            self._meters.restart()
            self._train_step.times = StepTimes()

    def _check_skipped(self, *, settle: bool = False) -> None:
        """Ends a run that skips too many steps. Without ``settle``, the last step is checked after the next one."""
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
        metrics["train/epoch"] = self.step / self.job.steps_per_epoch
        metrics |= {f"optim/{name}": rate for name, rate in rates_in_use(self.optimizer).items()}
        for name, weight in self.criterion.loss_weights.items():
            metrics[f"loss/weight/{name.removeprefix('loss_')}"] = weight
        if metrics["train/bad_images"]:
            self._count_bad_images()
        if self.context.rank == 0:
            with self.inessential("metrics cannot be recorded"):
                self.tracker.log_metrics(metrics, self.step)
            self.context.say(step_line(metrics, self.step, self.job.total_steps, self.job.steps_per_epoch))

    def _count_bad_images(self) -> None:
        """Adds the images that some worker could not read since the last count; the result is the same on all workers.

        Those that were left out when the data was opened, because not even their size can be read, count as well.
        """
        for image_ids in self.context.gather(self._bad_since):
            self.state.bad_image_ids.update(image_ids)
        self._bad_since = []
        left_out = 0 if self.job.data.train is None else self.job.data.train.images_left_out
        count, most = len(self.state.bad_image_ids) + left_out, self.job.config.data.max_bad_images
        if count > most:
            raise RunFailed(
                f"step {self.step}: {count} different images could not be read, more than data.max_bad_images={most}; "
                "`python -m detr_ray.check ... --decode` lists them",
                agreed=True,
            )

    def _checkpoint_due(self) -> bool:
        every = self.job.config.train.checkpoint_every_steps
        if self.step >= self.job.total_steps or (every is not None and self.step % every == 0):
            return True
        latest = self.checkpoints.latest
        since = self.step - (0 if latest is None else latest.step)
        at_epoch_end = self.step % self.job.steps_per_epoch == 0
        return self.validation.falls_on(self.step) or (at_epoch_end and since >= MIN_STEPS_BETWEEN_CHECKPOINTS)

    def _save(self, pauses: Sequence[float]) -> None:
        """Writes a checkpoint of this step.

        If a checkpoint cannot be written (a full disk), the run goes on: the last good checkpoint stays, and the next
        one is tried when it is due. Only the last checkpoint of a run must succeed.

        Args:
            pauses: seconds before further attempts; see `RunCheckpoints.save`.
        """
        self._check_skipped(settle=True)
        self._count_bad_images()
        interval = self._meters.totals(self._train_step.times)
        of_all_workers = {
            "interval": interval if interval["steps"] else {},
            "statistics": self.state.statistics.of_all_workers(),
        }
        details = {
            "epoch": self.step / self.job.steps_per_epoch,
            "world_size": self.context.world_size,
            "global_batch_size": self.job.config.train.global_batch_size,
        }
        if self.context.rank == 0:
            self.tracker.sync()  # a resumed run does not log the steps before its checkpoint again
        with self.state.statistics.averaged():
            problem = self.checkpoints.save(
                self.step,
                lambda: self.state.files(self._train_step, of_all_workers),
                details,
                evaluation_due=self.validation.falls_on(self.step),
                held=self.job.hold_evaluated and self.validation.falls_on(self.step),
                pauses=pauses,
            )
        if problem and pauses is PATIENTLY:
            raise RunFailed(
                f"run.storage: the last checkpoint could not be written: {problem}; mend the storage, then the same "
                "command goes on from the checkpoint before",
                agreed=True,
            )

    def _result(
        self, status: Literal["finished", "stopped", "nothing to do"], leave: LeaveReason | None, seconds: float
    ) -> FitResult:
        latest = self.checkpoints.latest
        ended_early = "" if leave or self.step >= self.job.total_steps else self.validation.verdict
        if self.context.rank == 0:
            self.checkpoints.finish()
            if status == "finished" and ended_early:
                with self.inessential("tags cannot be recorded"):
                    self.tracker.set_tags({"run.ended_early": ended_early})
                self.context.say(f"ending after step {self.step}: {ended_early}")
            if status == "finished" and latest is not None:
                with self.inessential("the last checkpoint cannot be recorded"):
                    self.tracker.log_file(join(latest.path, MODEL_FILE), "checkpoints/last")
        best = self.checkpoints.best
        logger.info("loop ended (%s) after %s", status, duration(seconds))
        return FitResult(
            run_name=self.job.run.name,
            run_path=self.job.run.path,
            status=status,
            step=self.step,
            metrics=self.validation.metrics,
            best_metrics=dict((best.metrics if best else None) or {}),
            best_checkpoint=best.path if best else None,
            table=self.validation.table,
            train_s=seconds,
            leave=leave,
            ended_early=ended_early,
        )
