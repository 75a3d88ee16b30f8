"""Evaluating a checkpoint on its own: from a configuration to the 12 numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from pyarrow.fs import FileType
from torch import Tensor

from detr_ray.addresses import join
from detr_ray.config import Config, ConfigError, LossConfig, ModelConfig, flatten
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import COCO_NUM_CLASSES, LabelMap
from detr_ray.detector import Detector, build_detector, build_skeleton
from detr_ray.detector.artifact import MODEL_FILE, read_saved_model
from detr_ray.engine.checkpoints.run_directory import absolute_storage
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.cpu import warn_of_slow_precision
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import Say, open_evaluation_data
from detr_ray.engine.stream.batches import BatchSource
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.engine.stream.positions import refuse_positions_out_of_reach
from detr_ray.engine.validation.evaluation_config import DECISIVE, evaluation_config
from detr_ray.engine.validation.evaluator import build_evaluator
from detr_ray.evaluation import CocoMetrics, DetectionTable
from detr_ray.locations import file_info
from detr_ray.model.weights import PUBLISHED_ROWS, WeightsError, shorten_names, whole_state
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
        loss_config: the loss that it was trained with; says what its logits mean.
        initial_weights: the checkpoint's model state; None where it travels beside the job.
        checkpoint: where the weights come from, for messages.
        storage: absolute ``run.storage``.
    """

    data: PlannedData
    model_config: ModelConfig
    loss_config: LossConfig
    initial_weights: dict[str, Tensor] | None
    checkpoint: str
    storage: str

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that decide the result, with their values."""
        values = flatten(self.data.config)
        return {key: values[key] for key in DECISIVE}

    def build_detector(self) -> Detector:
        """The detector with the checkpoint's weights."""
        detector = build_detector(self.model_config, self.loss_config, self.data.label_map.num_classes)
        assert self.initial_weights is not None
        detector.model.load_state_dict(self.initial_weights)
        return detector


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
    """Opens the checkpoint and the validation set: all that can be refused is refused here.

    What decides the result and is not given comes from the run, see `evaluation_config`.

    Raises:
        ConfigError: no checkpoint is named, or it does not fit the configuration or the data.
        DataError: the data is not usable.
    """
    source = find_checkpoint(config.checkpoint_to_evaluate())
    try:
        saved = read_saved_model(source, say)
        trained = saved.config or config
        skeleton = build_skeleton(trained.model, 1)
        weights = saved.weights_for(skeleton)
    except WeightsError as error:
        raise ConfigError(f"eval.checkpoint: {error}") from error
    config, lines = evaluation_config(config, saved.config, source)
    for line in lines:
        say(line)
    val = open_evaluation_data(config.data, say)
    label_map = saved.label_map
    if label_map is None:
        num_classes = skeleton.weight_names.classes_in(weights.tensors)
        label_map = _unnamed_labels(config.data.label_space, num_classes, val, source)
    else:
        label_map.check_covers(val.categories, val.source)
    refuse_positions_out_of_reach(config, trained.model, None, val)
    try:
        state = whole_state(build_skeleton(trained.model, label_map.num_classes), weights, source)
    except WeightsError as error:
        raise ConfigError(f"eval.checkpoint: {error}") from error
    kind = "averaged weights" if saved.is_averaged else "weights"
    say(f"{kind} of {source}; {len(val)} images, {label_map.num_classes} classes")
    if weights.beside:
        say(f"left out, since it is beside the detector: {shorten_names(weights.beside)}")
    storage = join(absolute_storage(config.run.storage), "evaluations")
    return EvaluationJob(PlannedData(config, None, val, label_map), trained.model, trained.loss, state, source, storage)


def _unnamed_labels(space: str, num_classes: int | None, val: DatasetIndex, source: str) -> LabelMap:
    """Labels of weights that do not name their classes; by their number, where ``data.label_space`` leaves it open."""
    rows = COCO_NUM_CLASSES if num_classes is None else num_classes
    if space == "auto":
        space = "coco91" if rows in PUBLISHED_ROWS else "contiguous"
    label_map = LabelMap.for_space(space, val.categories, val.source)
    if space == "coco91" and rows in PUBLISHED_ROWS:
        others = (None,) * (rows - label_map.num_classes)  # panoptic weights go on with classes that have no boxes
        label_map = LabelMap(label_map.names + others, label_map.category_ids + others)
    if rows != label_map.num_classes:
        raise ConfigError(
            f"eval.checkpoint: {source} names no classes; it has {rows}, which does not fit the "
            f"{label_map.num_classes} of {val.source} (data.label_space={space})"
        )
    return label_map


def run_evaluation(job: EvaluationJob, context: WorkerContext, batches: BatchSource) -> EvaluationResult | None:
    """Evaluates on one worker; every worker must call it. The result is rank 0's, None elsewhere."""
    if context.rank == 0:
        warn_of_slow_precision(job.data.config.train.precision, context)
    detector = job.build_detector()
    model = detector.model.to(context.device)
    if job.data.config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    evaluator = build_evaluator(job.data, context, detector.criterion.class_loss)
    detections = evaluator.find(model, batches.evaluation_batches())
    if context.rank == 0:
        for line in evaluator.bad_images.values():
            context.say(f"WARNING: image left out, counts as without detections: {line}")
    if problem := context.broadcast(_problem(job, detections)):
        raise RunFailed(problem, agreed=True)
    if detections is None:
        return None
    context.enter("scoring", 0)
    return EvaluationResult(job.checkpoint, evaluator.score(detections), detections)


def _problem(job: EvaluationJob, detections: DetectionTable | None) -> str | None:
    """Why detections cannot be scored; finite weights may still overflow on the way."""
    if detections is None or (np.isfinite(detections.scores).all() and np.isfinite(detections.boxes_xywh_px).all()):
        return None
    return (
        f"eval.checkpoint: {job.checkpoint} gives predictions that are not finite with "
        f"train.precision={job.data.config.train.precision}; try train.precision=fp32, or an earlier checkpoint"
    )
