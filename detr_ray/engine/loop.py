"""The training loop. It runs on any worker context: alone in a process, or as one of many workers.

Everything that a step depends on (batches, random numbers, learning rate, loss weights) is a function of the step's
number, so that going on from a checkpoint of step ``k`` is the same as never having stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import Any, Literal

import torch

from detr_ray.engine.batches import BatchSource
from detr_ray.engine.checkpoint import CheckpointError, CheckpointInfo
from detr_ray.engine.context import LeaveReason, WorkerContext
from detr_ray.engine.ema import ModelEma
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob
from detr_ray.engine.meters import MEANS, Meters
from detr_ray.engine.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from detr_ray.engine.progress import duration, evaluation_line, step_line
from detr_ray.engine.result import FitResult
from detr_ray.engine.scoring import BackgroundScoring, Scored
from detr_ray.engine.step import StepOutcome, StepTimes, TrainStep
from detr_ray.tracking import Tracker

logger = logging.getLogger(__name__)

MODEL_FILE = "model.pt"
TRAINING_FILE = "training.pt"

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
        self.step = 0
        self.num_bad_images = 0
        self.table = ""
        self._store = job.run.checkpoints
        self._latest: CheckpointInfo | None = None

        context.enter("starting", 0)
        self.model = job.build_model().to(context.device)
        if config.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.criterion = job.build_criterion().to(context.device)
        self.optimizer = build_optimizer(
            self.model, lr=config.optim.lr, lr_backbone=config.optim.lr_backbone, weight_decay=config.optim.weight_decay
        )
        self.ema = ModelEma(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self._lr_factor = learning_rate_factor(
            config.optim.schedule,
            epochs=config.train.epochs,
            step_epochs=config.optim.step_epochs,
            milestones=config.optim.milestones,
            gamma=config.optim.gamma,
            warmup_epochs=config.optim.warmup_epochs,
            min_lr_factor=config.optim.min_lr_factor,
        )
        restored = self._restore_weights()  # before the model is wrapped: wrapping compares it between workers
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
        if restored is not None:
            self._train_step.scaler.load_state_dict(restored["scaler"])
            self._train_step.num_skipped = restored["num_skipped"]
        self._scoring = None if job.data.val is None else BackgroundScoring(job.data, context)
        names = [*sorted(self.criterion.weights), *MEANS]
        self._meters = Meters(context, names, config.train.global_batch_size)

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
        if self._evaluation_due():  # an earlier process died between the checkpoint and its evaluation
            self._evaluate()
        waiting_since = self._wait_for_data()
        for micro_batches in self.batches.train_batches(self.step, self.job.total_steps):
            self._train_step.times.data_wait += time.perf_counter() - waiting_since
            epoch = self.step / self.job.steps_per_epoch
            set_learning_rate(self.optimizer, self._lr_factor.at(epoch))
            self.criterion.at_epoch(epoch)
            outcome = self._train_step(self.step, micro_batches)
            self._after_step(outcome, len(micro_batches))
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

    def _after_step(self, outcome: StepOutcome, num_micro_batches: int) -> None:
        config = self.job.config.train
        self._record_stream(outcome)
        if self.ema is not None:
            self._train_step.settle()
            if not outcome.skipped:
                self.ema.update(self.model)
        self._check_skipped()
        self._meters.add(outcome)
        self.step += 1
        if self.step % config.log_every_steps == 0 or self.step == self.job.total_steps or self.step == 1:
            self._log(num_micro_batches)
            self._note_scores(wait=False)

    def _check_skipped(self, *, settle: bool = False) -> None:
        """Ends a run that skips too much; without ``settle`` the last step is looked at after the next one only."""
        if settle:
            self._train_step.settle()
        if self._train_step.num_skipped > self.job.config.train.max_nonfinite_steps:
            raise RunFailed(
                f"step {self.step}: {self._train_step.num_skipped} updates were left out because something was not "
                "finite, more than train.max_nonfinite_steps; lower optim.lr or use another train.precision",
                agreed=True,
            )

    def _log(self, num_micro_batches: int) -> None:
        self.context.enter("adding up metrics", self.step)
        self._check_skipped(settle=True)
        metrics = self._meters.flush(self._train_step.times, num_micro_batches)
        self._train_step.times = StepTimes()
        loss = sum(weight * metrics.get(f"train/{name}", 0.0) for name, weight in self.criterion.weights.items())
        metrics["train/loss"] = loss
        metrics["train/epoch"] = self.step / self.job.steps_per_epoch
        metrics["optim/lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["optim/lr_backbone"] = self.optimizer.param_groups[1]["lr"]
        for name in ("ce", "bbox", "giou"):
            metrics[f"loss/weight/{name}"] = self.criterion.weights[f"loss_{name}"]
        self.num_bad_images += int(metrics["train/bad_images"])
        if self.num_bad_images > self.job.config.data.max_bad_images:
            raise RunFailed(
                f"step {self.step}: {self.num_bad_images} images could not be read, more than data.max_bad_images; "
                "`python -m detr_ray.check ... --decode` lists them",
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
        model = self.model if self.ema is None else self.ema.module
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
        self._average_running_statistics()
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
            info = self._store.save(self.step, self._state(), details)
        except OSError as error:
            self.context.say(f"WARNING: no checkpoint at step {self.step}: {error}")
            return None, str(error)
        self._store.prune(self.job.config.train.keep_last)
        logger.info("checkpoint of step %d in %.2f s", self.step, time.perf_counter() - started)
        return info, ""

    def _state(self) -> dict[str, Any]:
        model_file = {
            "format": "detr_ray",
            "model": self.model.state_dict(),
            "label_map": self.job.data.label_map.to_dict(),
            "config": self.job.config.to_dict(),
            "step": self.step,
        }
        if self.ema is not None:
            model_file["ema"] = self.ema.module.state_dict()
        training = {
            "step": self.step,
            "seed": self.job.config.run.seed,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._train_step.scaler.state_dict(),
            "ema_updates": 0 if self.ema is None else self.ema.num_updates,
            "num_skipped": self._train_step.num_skipped,
            "num_bad_images": self.num_bad_images,
        }
        return {MODEL_FILE: model_file, TRAINING_FILE: training}

    def _restore_weights(self) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint; the same one on every worker. Returns its training state."""
        info, loaded = self._newest_readable() if self.context.rank == 0 else (None, None)
        info = self.context.gather(info)[0]
        if info is None:
            return None
        model_file, training = loaded or (self._store.load(info, MODEL_FILE), self._store.load(info, TRAINING_FILE))
        try:
            self.model.load_state_dict(model_file["model"])
            self.optimizer.load_state_dict(training["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"{info.path} does not fit this model; to start from its weights use model.init_from: {error}"
            ) from error
        for group, rate in zip(
            self.optimizer.param_groups, (self.job.config.optim.lr, self.job.config.optim.lr_backbone), strict=True
        ):
            group["initial_lr"] = rate
        if self.ema is not None:
            self.ema.module.load_state_dict(model_file["ema"])
            self.ema.num_updates = training["ema_updates"]
        self.step, self._latest = training["step"], info
        self.num_bad_images = training["num_bad_images"]
        if self.context.rank == 0:
            self.context.say(f"going on from step {self.step} (epoch {self.step / self.job.steps_per_epoch:.2f})")
        return training

    def _newest_readable(self) -> tuple[CheckpointInfo | None, tuple[dict[str, Any], dict[str, Any]] | None]:
        for info in reversed(self._store.checkpoints()):
            try:
                return info, (self._store.load(info, MODEL_FILE), self._store.load(info, TRAINING_FILE))
            except CheckpointError as error:
                self.context.say(f"WARNING: {error}; trying the one before it")
        return None, None

    def _average_running_statistics(self) -> None:
        """Trainable batch norm keeps statistics of its own worker's images: what is kept is their mean."""
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if self.context.world_size == 1 or self.job.config.model.backbone_norm != "batch" or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        flat = self.context.all_reduce_sum(flat) / self.context.world_size
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
        if self.ema is not None:
            for mine, theirs in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

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
