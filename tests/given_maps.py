"""Pyramids whose maps a test gives, in place of the backbone's and of their projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_ray.model.detection_model import DetectionModel
from detr_ray.model.features import FeatureLevel
from detr_ray.structures import ModelOutput


class AsItIs(torch.nn.Module):
    """A projection that gives the map that it gets."""

    def forward(self, source: Tensor, source_padding: Tensor | None, padding: Tensor | None) -> Tensor:
        return source


def take_maps_as_they_are(model: DetectionModel, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Leaves out the projection of the maps."""
    monkeypatch.setattr(model, "input_proj", torch.nn.ModuleList([AsItIs()] * count))


def predicted_from(model: DetectionModel, maps: list[Tensor], mask: Tensor | None) -> ModelOutput:
    """What a model predicts from maps of strides 8, 16, ... of an image of 64 x 128."""
    shrunk = [None if mask is None else mask[:, :: 8 * 2**i, :: 8 * 2**i] for i in range(len(maps))]
    levels = [FeatureLevel(*pair, 8 * 2**i) for i, pair in enumerate(zip(maps, shrunk, strict=True))]
    model.backbone[0].forward = lambda images, mask: tuple(levels)
    with torch.no_grad():
        return model(torch.zeros(1, 3, 64, 128), mask)
