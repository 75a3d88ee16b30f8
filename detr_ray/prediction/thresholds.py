"""Score thresholds: one for all categories, or the best one of each category."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from detr_ray.data.label_map import LabelMap

Threshold = float | Literal["best_f1"] | None
"""Lowest accepted score; ``"best_f1"`` for the best threshold of each category; None for all scores."""


class ThresholdError(ValueError):
    """A threshold is not valid, or the best ones are not known; the message says what to give instead."""


def label_thresholds(
    threshold: Threshold, label_map: LabelMap, scores: Mapping[str, Any] | None, source: str
) -> np.ndarray | None:
    """The lowest accepted score of each label.

    Args:
        threshold: the threshold as given by the user.
        label_map: the labels.
        scores: the measured quality of the model's scores (`measure_scores`); None if it was not measured.
        source: the model, for messages.

    Returns:
        ``[num_classes]`` float32; None if all scores are accepted.

    Raises:
        ThresholdError: the threshold is not one of these, or the model's best thresholds are not known.
    """
    if threshold is None:
        return None
    if threshold == "best_f1":
        return _best(label_map, scores, source)
    is_number = isinstance(threshold, int | float | np.number) and not isinstance(threshold, bool)
    if not is_number or not math.isfinite(threshold) or not 0 <= threshold <= 1:
        raise ThresholdError(f"threshold: must be a number from 0 to 1, 'best_f1' or None (got {threshold!r})")
    return np.full(label_map.num_classes, threshold, np.float32)


def _best(label_map: LabelMap, scores: Mapping[str, Any] | None, source: str) -> np.ndarray:
    if not scores:
        raise ThresholdError(
            f"threshold: 'best_f1' is not known of {source}: what its scores mean is not beside it. Have it measured "
            "(python -m detr_ray.evaluate --scores FILE) and load the model with that file, or give a number"
        )
    of_category = {int(category_id): one["threshold"] for category_id, one in scores["categories"].items()}
    # A category without objects in the validation set has no threshold of its own.
    of_all = scores["all"]["threshold"]
    if of_all is None:
        raise ThresholdError(f"threshold: 'best_f1' means nothing for {source}: none of its detections was right")
    chosen = [of_category.get(category_id) for category_id in label_map.category_ids]  # type: ignore[arg-type]
    return np.array([of_all if value is None else value for value in chosen], np.float32)
