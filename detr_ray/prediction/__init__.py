"""Models in use: images of any kind in, boxes in pixels of these images out."""

from __future__ import annotations

from detr_ray.prediction.found import Prediction
from detr_ray.prediction.loaded_model import LoadedModel

__all__ = ["LoadedModel", "Prediction"]
