"""Evaluates a checkpoint: from a configuration to the 12 numbers.

A run validates its weights at certain image sizes; with other sizes the same weights have other scores, which may be
close to 0. So the settings that decide the result come from the checkpoint, unless the user gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_ray.addresses import join
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, LossConfig, ModelConfig, flatten, with_defaults
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import COCO_NUM_CLASSES, LabelMap
from detr_ray.detector import Detector, build_detector, build_skeleton
from detr_ray.detector.package import read_model
from detr_ray.engine.checkpoints.found_model import find_model
from detr_ray.engine.checkpoints.run_directory import absolute_storage
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.cpu import warn_of_slow_precision
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.opened_data import open_evaluation_data
from detr_ray.engine.stream.batches import BatchSource
from detr_ray.engine.stream.planned_data import PlannedData, refuse_positions_out_of_reach
from detr_ray.engine.validation.evaluator import build_evaluator
from detr_ray.evaluation import CocoMetrics, DetectionTable
from detr_ray.model.exportable import reduce_to_inference
from detr_ray.model.state_dicts import WeightsError, shorten_names
from detr_ray.model.weights import PUBLISHED_ROWS, whole_state

DECISIVE = (
    "eval.size",
    "eval.max_size",
    "eval.max_detections",
    "train.precision",
    "data.reduced_decoding",
    "data.on_bad_image",
    "data.max_bad_images",
)
"""Keys that affect the result of an evaluation, beside the weights, the model and the images."""

_SHOWN = DECISIVE[:4]
_IMAGES = ("root", "format", "val", "generate", "max_images", "split")
_DIVIDED = ("train", "sources")
"""Keys of ``data`` that say which images there are; the second list is for data with ``split``. They are taken from the
checkpoint together or not at all."""


def evaluation_config(
    given: Config, stored: Config | None, source: str, *, with_data: bool = True
) -> tuple[Config, list[str]]:
    """The configuration to evaluate with.

    Args:
        given: the user's configuration. Keys that it does not set may get other values than its defaults.
        stored: the configuration that the checkpoint was trained with; None where it has none.
        source: the checkpoint, for messages.
        with_data: whether the run's own data is taken where none is given.

    Returns:
        The configuration, and lines that tell the user which settings are used and where they are from.

    Raises:
        ConfigError: given and stored values contradict each other.
    """
    if stored is None:
        return given, [_described(given, given, {})]
    defaults, lines = _defaults(given, stored, with_data)
    try:
        config = with_defaults(given, defaults, f"the configuration in {source}")
    except ConfigError as error:
        raise ConfigError([f"eval.checkpoint: {line}" for line in error.errors]) from error
    line = _described(config, given, defaults)
    theirs, ours = flatten(stored), flatten(config)
    if other := [f"{key}={theirs[key]}" for key in _SHOWN if theirs[key] != ours[key]]:
        line += f"; the run itself was validated with {', '.join(other)}"
    return config, [line, *lines]


def _described(config: Config, given: Config, from_run: Mapping[str, Mapping[str, Any]]) -> str:
    """Lines with the settings that decide the result, grouped by their origin."""
    values = flatten(config)
    origins: dict[str, list[str]] = {}
    for key in _SHOWN:
        section, name = key.split(".")
        origin = "by default"
        if name in from_run.get(section, ()):
            origin = "from the run"
        elif name in getattr(given, section).model_fields_set:
            origin = "as given"
        origins.setdefault(origin, []).append(f"{key}={values[key]}")
    return "scored with " + "; ".join(f"{', '.join(keys)} ({origin})" for origin, keys in origins.items())


def _defaults(given: Config, stored: Config, with_data: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The run's values for keys that were not given, by section; and further text for the user."""
    values, lines = stored.to_dict(), []
    taken: dict[str, dict[str, Any]] = {"eval": {}, "train": {}, "data": {}}
    for key in DECISIVE:
        section, name = key.split(".")
        if name not in getattr(given, section).model_fields_set:
            taken[section][name] = values[section][name]
    if taken["train"].get("precision") == "fp16" and (given.train.use_gpu is False or not torch.cuda.is_available()):
        del taken["train"]["precision"]
        lines.append("the run was trained with train.precision=fp16, which needs a GPU: it is scored in fp32 here")
    if with_data and not {"root", "train", "val", "sources"} & given.data.model_fields_set:
        for name in _IMAGES if stored.data.split is None else (*_IMAGES, *_DIVIDED):
            if name not in given.data.model_fields_set:
                taken["data"][name] = values["data"][name]
        lines.append("the validation data is the run's own, since none is given")
    return taken, lines


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
    """An evaluation that can be computed in any process.

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

    @property
    def num_images(self) -> int:
        """Images of the validation set."""
        assert self.data.val is not None, "there is a validation set"
        return len(self.data.val)

    @property
    def names(self) -> dict[int, str]:
        """Category id -> name, of the model's and of the validation set's: either may have more."""
        assert self.data.val is not None, "there is a validation set"
        return dict(self.data.label_map.categories) | dict(self.data.val.categories)

    def build_detector(self) -> Detector:
        """The detector with the checkpoint's weights."""
        detector = build_detector(self.model_config, self.loss_config, self.data.label_map.num_classes)
        assert self.initial_weights is not None
        detector.model.load_state_dict(self.initial_weights)
        return detector


def prepare_evaluation(config: Config, say: Say) -> EvaluationJob:
    """Opens the checkpoint and the validation set. Everything that can be refused is refused here.

    Settings that decide the result and are not given come from the run; see `evaluation_config`.

    Raises:
        ConfigError: no checkpoint is named, or it does not fit the configuration or the data.
        DataError: the data is not usable.
    """
    found = find_model(config.checkpoint_to_evaluate(), "eval.checkpoint")
    source = found.file
    try:
        saved = read_model(source, say, found.sha256)
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
    """Labels of weights without class names; with ``data.label_space=auto``, chosen by the number of classes."""
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
    # On the CPU, as for prediction: a GPU may round otherwise.
    reduce_to_inference(detector.model)
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
    """Why detections cannot be scored; even finite weights can give values that are not finite."""
    if detections is None or (np.isfinite(detections.scores).all() and np.isfinite(detections.boxes_xywh_px).all()):
        return None
    return (
        f"eval.checkpoint: {job.checkpoint} gives predictions that are not finite with "
        f"train.precision={job.data.config.train.precision}; try train.precision=fp32, or an earlier checkpoint"
    )
