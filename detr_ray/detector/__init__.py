"""A detector: the model of an architecture, its loss, and the conversion of its output to boxes.

Only ``model`` and ``loss`` depend on the architecture; all other packages use a detector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from detr_ray.config import LossConfig, ModelConfig
from detr_ray.detector.postprocess import postprocess
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.model import DetectionModel, build_model

__all__ = ["Detector", "build_detector", "build_skeleton", "postprocess"]


@dataclass(frozen=True)
class Detector:
    """A model and its loss.

    Attributes:
        model: the network.
        criterion: its loss.
    """

    model: DetectionModel
    criterion: SetCriterion


def build_detector(model: ModelConfig, loss: LossConfig, num_classes: int) -> Detector:
    """The detector of a configuration, with random weights.

    Args:
        model: the section ``model``.
        loss: the section ``loss``.
        num_classes: classes without no-object.
    """
    network = build_model(model, num_classes)
    criterion = build_criterion(loss, num_classes, num_queries=network.num_queries, cfg_model=model)
    return Detector(network, criterion)


def build_skeleton(model: ModelConfig, num_classes: int) -> DetectionModel:
    """The model's names and shapes, without memory for its weights."""
    with torch.device("meta"):
        return build_model(model, num_classes)
