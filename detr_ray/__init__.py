"""detr_ray trains DETR object detectors with Ray, from a laptop to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing the package takes no time; torch is imported with the first model
    from detr_ray.config import Config
    from detr_ray.prediction import LoadedModel

__version__ = "0.1.0"


def load_model(source: str, config: Config | None = None, scores: str | None = None) -> LoadedModel:
    """Loads a model for use: ``detr_ray.load_model("runs/mine").predict("photo.jpg", threshold=0.5)``.

    See `detr_ray.model_sources.load_model`.
    """
    from detr_ray.model_sources import load_model as load

    return load(source, config, scores)
