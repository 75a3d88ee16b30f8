"""Networks that turn images into feature maps; a file each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.model.backbones.resnet import ResNetBackbone
from detr_ray.model.features import Backbone

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig


def build_backbone(cfg_model: ModelConfig, strides: Sequence[int]) -> Backbone:
    """The backbone of a config's ``model`` section, with random weights; all architectures get theirs here.

    Args:
        cfg_model: the section.
        strides: of the maps that the architecture reads, ascending: pixels of the image a cell.

    Raises:
        ValueError: the section's values contradict each other.
    """
    return ResNetBackbone.from_config(cfg_model, strides)
