"""The set loss: bipartite matching, the criterion, and weights that may change over a run.

Plain torch and scipy. Knows nothing of the model, the data, workers or tracking.
"""

from __future__ import annotations

from detr_ray.loss.class_losses import ClassLoss, Scores, SoftmaxLoss
from detr_ray.loss.criterion import ERROR_NAMES, SetCriterion, build_criterion
from detr_ray.loss.errors import NonFiniteOutputs
from detr_ray.loss.matcher import HungarianMatcher

__all__ = [
    "ERROR_NAMES",
    "ClassLoss",
    "HungarianMatcher",
    "NonFiniteOutputs",
    "Scores",
    "SetCriterion",
    "SoftmaxLoss",
    "build_criterion",
]
