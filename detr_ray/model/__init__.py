"""Detectors in plain torch: backbones, transformers, a file for each architecture, and weights from files."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from detr_ray.architectures import ARCHITECTURES
from detr_ray.model.detection_model import DetectionModel
from detr_ray.model.published import load_published, published_state_dict

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

__all__ = ["DetectionModel", "build_model", "load_published", "published_state_dict"]


def build_model(cfg_model: ModelConfig, num_classes: int = 91) -> DetectionModel:
    """Builds the architecture with random weights; nothing is read from disk or fetched.

    Args:
        cfg_model: the config's ``model`` section. ``backbone_weights`` and ``init_from`` play no part here.
        num_classes: classes without no-object; 91 for the official COCO ids.

    Raises:
        ValueError: the section's values contradict each other.
    """
    # Sections made by hand, with only the original's keys, are of the original's architecture.
    architecture = getattr(cfg_model, "architecture", "detr")
    model: DetectionModel = pkgutil.resolve_name(ARCHITECTURES[architecture])(cfg_model, num_classes)
    return model
