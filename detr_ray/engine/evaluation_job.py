"""Evaluating a checkpoint on its own: from a configuration to the 12 numbers."""

from __future__ import annotations

import dataclasses

import torch
from pyarrow.fs import FileType
from torch import Tensor

from detr_ray.config import Config, ConfigError, ModelConfig, config_from_dict
from detr_ray.data.label_map import LabelMap
from detr_ray.engine.batches import BatchSource
from detr_ray.engine.checkpoint import CheckpointStore
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.evaluator import build_evaluator
from detr_ray.engine.job import Say, open_evaluation_data
from detr_ray.engine.planned_data import PlannedData
from detr_ray.engine.run_directory import absolute_storage
from detr_ray.engine.training_state import MODEL_FILE
from detr_ray.evaluation import CocoMetrics, DetectionTable
from detr_ray.locations import file_info, join
from detr_ray.model import Detr, build_model
from detr_ray.model.weights import read_checkpoint
from detr_ray.retries import reason_of


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gave.

    Attributes:
        checkpoint: what was evaluated.
        metrics: the 12 numbers and those of each category.
        detections: everything the model found.
    """

    checkpoint: str
    metrics: CocoMetrics
    detections: DetectionTable


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """An evaluation, ready to be computed anywhere.

    Attributes:
        data: the validation set, with the labels of the checkpoint.
        model_config: the model as the checkpoint was trained.
        initial_weights: the checkpoint's model state; None where it travels beside the job.
        checkpoint: where the weights come from, for messages.
        storage: absolute ``run.storage``.
    """

    data: PlannedData
    model_config: ModelConfig
    initial_weights: dict[str, Tensor] | None
    checkpoint: str
    storage: str

    def build_model(self) -> Detr:
        """The model with the checkpoint's weights."""
        model = build_model(self.model_config, self.data.label_map.num_classes)
        assert self.initial_weights is not None
        model.load_state_dict(self.initial_weights)
        return model


def find_checkpoint(given: str) -> str:
    """The model file that a user means: a run's folder (its best checkpoint), a checkpoint's folder, or a file or URL.

    Raises:
        ConfigError: a folder without a whole checkpoint.
    """
    if given.startswith(("http://", "https://")):
        return given
    try:
        if file_info(given).type != FileType.Directory:
            return given
        if file_info(join(given, MODEL_FILE)).type == FileType.File:
            return join(given, MODEL_FILE)
        store = CheckpointStore(join(given, "checkpoints"))
        info = store.best() or store.latest()
    except OSError as error:
        raise ConfigError(f"eval.checkpoint: {given} cannot be read: {reason_of(error)}") from error
    if info is None:
        raise ConfigError(f"eval.checkpoint: {given} is neither a run nor a checkpoint: it holds no whole checkpoint")
    return join(info.path, MODEL_FILE)


def prepare_evaluation(config: Config, say: Say) -> EvaluationJob:
    """Opens the checkpoint and the validation set.

    Raises:
        ConfigError: no checkpoint is named, or it does not fit the configuration or the data.
        DataError: the data is not usable.
    """
    if config.eval.checkpoint is None:
        raise ConfigError(
            "eval.checkpoint: is missing: give a run's folder, a checkpoint, or DETR weights (path or URL)"
        )
    source = find_checkpoint(config.eval.checkpoint)
    checkpoint = read_checkpoint(source)
    val = open_evaluation_data(config.data, say)
    model_config = config.model
    if checkpoint.get("label_map") is not None:
        label_map = LabelMap.from_dict(checkpoint["label_map"])
        label_map.check_covers(val.categories, val.source)
        # The weights' own model; of the configuration only what does not shape them could differ.
        model_config = config_from_dict(checkpoint["config"], source).model
    else:
        space = "coco91" if config.data.label_space == "auto" else config.data.label_space
        label_map = LabelMap.for_space(space, val.categories, val.source)
    state = checkpoint["ema"] if checkpoint.get("ema") is not None else checkpoint["model"]
    storage = join(absolute_storage(config.run.storage), "evaluations")
    job = EvaluationJob(PlannedData(config, None, val, label_map), model_config, state, source, storage)
    try:
        with torch.device("meta"):
            skeleton = build_model(model_config, label_map.num_classes)
        skeleton.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"eval.checkpoint: {source} does not fit the model section: {error}") from error
    say(f"checkpoint {source}; {len(val)} images, {label_map.num_classes} classes")
    return job


def run_evaluation(job: EvaluationJob, context: WorkerContext, batches: BatchSource) -> EvaluationResult | None:
    """Evaluates on one worker; every worker must call it. The result is rank 0's, None elsewhere."""
    model = job.build_model().to(context.device)
    if job.data.config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    evaluator = build_evaluator(job.data, context)
    detections = evaluator.find(model, batches.evaluation_batches())
    if detections is None:
        return None
    context.enter("scoring", 0)
    return EvaluationResult(job.checkpoint, evaluator.score(detections), detections)
