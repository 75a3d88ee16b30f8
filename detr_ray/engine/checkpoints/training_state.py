"""The state of a training run between two steps: saved into a checkpoint and restored from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from detr_ray.detector.artifact import MODEL_FILE, saved_model
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.checkpoints.run_checkpoints import RunCheckpoints
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.errors import CheckpointError, RunFailed
from detr_ray.engine.training_step.averages import ModelEma, RunningStatistics
from detr_ray.engine.training_step.optimizer import build_optimizer, restore_optimizer
from detr_ray.engine.training_step.parameters import group_rates
from detr_ray.engine.training_step.step import TrainStep

if TYPE_CHECKING:  # see the loop
    from detr_ray.engine.checkpoints.store import CheckpointStore
    from detr_ray.engine.job import TrainJob

TRAINING_FILE = "training.pt"


class TrainingState:
    """One worker's copy of the state. Equal on all workers, except for the running statistics of batch norm.

    Args:
        job: what to train.
        context: this worker's group.

    Attributes:
        model: the model, with its first weights until a checkpoint is restored.
        criterion: the loss of the model.
        optimizer: the optimizer of the model's parameters.
        ema: the moving average of the weights; None without one.
        statistics: this worker's running statistics of batch norm.
        step: optimizer steps taken.
        bad_image_ids: ids of the training images that could not be read.
    """

    def __init__(self, job: TrainJob, context: WorkerContext) -> None:
        config = job.config
        self._job, self._context = job, context
        detector = job.build_detector()
        self.model = detector.model.to(context.device)
        if config.train.recompute_encoder:
            self.model.recompute_encoder()
        self.criterion = detector.criterion.to(context.device)
        if config.train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(
            self.model,
            group_rates(self.model, config.optim),
            weight_decay=config.optim.weight_decay,
            lr_factors=config.optim.lr_factors,
            layer_decay=config.optim.layer_decay,
            decay_norms_and_biases=config.optim.decay_norms_and_biases,
        )
        self.ema = ModelEma(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.statistics = RunningStatistics(self.model, self.ema.module if self.ema else None, context)
        self.step = 0
        self.bad_image_ids: set[int] = set()

    def files(self, train_step: TrainStep, of_all_workers: Mapping[str, Any]) -> dict[str, Any]:
        """The files of a checkpoint, by name.

        Args:
            train_step: the training step, whose state is saved, too.
            of_all_workers: further entries of the training file, collected from all workers.
        """
        averaged = None if self.ema is None else self.ema.module
        job = self._job
        model_file = saved_model(self.model, averaged, job.data.label_map, job.config, self.step, job.code_version)
        training = {
            "step": self.step,
            "seed": self._job.config.run.seed,
            "optimizer": self.optimizer.state_dict(),
            "scaler": train_step.scaler.state_dict(),
            "ema_updates": 0 if self.ema is None else self.ema.num_updates,
            "num_skipped": train_step.nonfinite_in_a_row,
            "bad_image_ids": sorted(self.bad_image_ids),
            **of_all_workers,
        }
        return {MODEL_FILE: model_file, TRAINING_FILE: training}

    def restore(self, checkpoints: RunCheckpoints) -> dict[str, Any]:
        """Loads the newest complete checkpoint, or the one of another run that this run begins at (`TrainJob.fork`).

        Rank 0 reads it, checks its hashes and sends it to the other ranks. Learning rates, weight decay and loss
        weights are not restored: they are those of the configuration.

        Returns:
            The rest of the training state, for `restore_step`; empty if there is no checkpoint.

        Raises:
            RunFailed: the checkpoint does not fit the model, or no checkpoint can be read.
        """
        found: list[CheckpointInfo] = []
        info, model_file, training, problem = self._newest_readable(checkpoints.store, found)
        info, problem = self._context.broadcast((info, problem))
        if problem:
            raise RunFailed(problem, agreed=True)
        if info is None:
            return {}
        forked = self._job.fork is not None and info.path == self._job.fork.path
        if not forked:
            checkpoints.going_on_from(info, found)
        try:
            # One part after another, so that a worker holds only one of them in addition to its own state.
            self.model.load_state_dict(self._context.broadcast(model_file.pop("model", None)))
            if self.ema is not None:
                self.ema.module.load_state_dict(self._context.broadcast(model_file.pop("ema", None)))
            training = self._context.broadcast(training)
            restore_optimizer(self.optimizer, training.pop("optimizer"))
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"{info.path} does not fit this model; to start from its weights use model.init_from: {error}",
                agreed=True,
            ) from error
        if self.ema is not None:
            self.ema.num_updates = training.get("ema_updates", 0)
        self.step = info.step
        self.bad_image_ids = set(training.get("bad_image_ids", ()))  # earlier releases stored only a number
        if self._context.rank == 0:
            epoch = f"step {self.step} (epoch {self.step / self._job.steps_per_epoch:.2f})"
            self._context.say(f"beginning at {epoch} of {info.path}" if forked else f"going on from {epoch}")
        return training

    def restore_step(self, train_step: TrainStep, training: dict[str, Any]) -> None:
        """Restores the state of the training step and this worker's running statistics, from the result of `restore`.

        Must be called after the model was wrapped for several workers: wrapping copies the statistics of rank 0.
        """
        self.statistics.restore(training.pop("statistics", None))
        if training.get("scaler"):
            train_step.scaler.load_state_dict(training["scaler"])
        train_step.nonfinite_in_a_row = training.get("num_skipped", 0)

    def _newest_readable(
        self, store: CheckpointStore, found: list[CheckpointInfo]
    ) -> tuple[CheckpointInfo | None, dict[str, Any], dict[str, Any], str]:
        """Rank 0: the newest undamaged checkpoint, its two files, and why the run cannot go on (empty if it can).

        Args:
            store: reads the checkpoints.
            found: all checkpoints are added to it.
        """
        if self._context.rank > 0:
            return None, {}, {}, ""
        try:
            found += store.checkpoints()
            for info in reversed(found):
                try:
                    return info, store.load(info, MODEL_FILE), store.load(info, TRAINING_FILE), ""
                except CheckpointError as error:
                    self._context.say(f"WARNING: {error}; trying the one before it")
            if not found and self._job.fork is not None:
                return self._forked(store, self._job.fork)
        except OSError as error:
            return None, {}, {}, f"run.storage: the checkpoints cannot be read now, so nothing is trained: {error}"
        problem = ""
        if found:
            problem = f"none of the checkpoints in {store.root} can be read; remove them all to begin the run anew"
        return None, {}, {}, problem

    def _forked(
        self, store: CheckpointStore, fork: CheckpointInfo
    ) -> tuple[CheckpointInfo | None, dict[str, Any], dict[str, Any], str]:
        """Rank 0: the checkpoint of another run, as `_newest_readable` gives one of this run."""
        try:
            return fork, store.load(fork, MODEL_FILE), store.load(fork, TRAINING_FILE), ""
        except (CheckpointError, OSError) as error:
            return None, {}, {}, f"run.fork_from: the run cannot begin at {fork.path}: {error}"
