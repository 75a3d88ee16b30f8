"""How much AP each image costs: the loss of AP, attributed to single annotations and detections.

Without interpolation, the AP of a category is a mean over its ``n`` annotations: of the precision at the rank where an
annotation is found, and of 0 for those that are not found. So ``1 - AP`` is a sum of two losses. A missed annotation
costs ``1 / n``. One that is found at rank ``r``, with ``f`` false detections up to this rank, costs ``f / r / n``; each
of these false detections contributes ``1 / r / n``. (COCO's AP is interpolated, and differs from this a little.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.matched import match_all
from detr_ray.evaluation.matching import IOU_THRESHOLDS


@dataclass(frozen=True)
class LostPrecision:
    """Loss of AP, mean over COCO's IoU thresholds and the categories that have annotations.

    Attributes:
        by_annotation: ``[A]`` loss by each missed annotation; 0 for others and for crowd regions.
        by_detection: ``[D]`` loss by each false detection.
        average_precision: AP without interpolation: 1 less the sum of both.
    """

    by_annotation: np.ndarray
    by_detection: np.ndarray
    average_precision: float

    def by_image(self, truth: GroundTruth, detections: DetectionTable) -> np.ndarray:
        """``[I]`` what each image costs, in the order of ``truth.image_ids``."""
        order = np.argsort(truth.image_ids)
        known = truth.image_ids[order]
        lost = np.zeros(len(known))
        np.add.at(lost, order[np.searchsorted(known, truth.image_of_box())], self.by_annotation)
        np.add.at(lost, order[np.searchsorted(known, detections.image_ids)], self.by_detection)
        return lost


def lost_precision(truth: GroundTruth, detections: DetectionTable) -> LostPrecision:
    """Attributes the loss of AP.

    Args:
        truth: the annotations.
        detections: in any order.
    """
    by_annotation = np.zeros(len(truth.category_ids))
    by_detection = np.zeros(len(detections))
    categories = [category for category in match_all(truth, detections) if category.to_find]
    weight = 1.0 / max(len(categories) * len(IOU_THRESHOLDS), 1)
    for category in categories:
        for threshold in range(len(IOU_THRESHOLDS)):
            counts = ~category.is_neutral[threshold]
            rows, right = category.found[counts], category.is_right[threshold, counts]
            ranks = np.arange(1, len(rows) + 1)
            at_or_after = np.cumsum((right / ranks)[::-1])[::-1]
            np.add.at(by_detection, rows[~right], weight * at_or_after[~right] / category.to_find)
            missed = category.annotated[~category.is_found[threshold]]
            np.add.at(by_annotation, missed, weight / category.to_find)
    lost = float(by_annotation.sum() + by_detection.sum())
    return LostPrecision(by_annotation, by_detection, 1.0 - lost if categories else 0.0)
