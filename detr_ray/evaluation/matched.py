"""COCO's matching with the rows of the original tables, for analyses of single detections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.grouped import group_by_category
from detr_ray.evaluation.matching import find_overlaps, match


@dataclass(frozen=True, slots=True, eq=False)
class MatchedCategory:
    """The detections and annotations of one category, matched at ``T`` IoU thresholds.

    Attributes:
        category_id: its id.
        found: ``[D]`` rows of the table of detections, from the highest score to the lowest.
        is_right: ``[T, D]`` bool, whether each matches an annotation.
        is_neutral: ``[T, D]`` bool, whether it matches a crowd region and is ignored.
        annotated: ``[G]`` rows of the ground truth, without crowd regions.
        is_found: ``[T, G]`` bool, whether each is matched.
    """

    category_id: int
    found: np.ndarray
    is_right: np.ndarray
    is_neutral: np.ndarray
    annotated: np.ndarray
    is_found: np.ndarray

    @property
    def to_find(self) -> int:
        """Number of annotations."""
        return len(self.annotated)


def match_all(truth: GroundTruth, detections: DetectionTable) -> list[MatchedCategory]:
    """Matches as COCO's AP does, boxes of all areas, up to 100 detections an image and category.

    Args:
        truth: the annotations.
        detections: in any order.

    Returns:
        Every category, by rising id.
    """
    grouped = group_by_category(truth, detections)
    is_crowd = grouped.annotations.is_crowd
    overlaps = find_overlaps(grouped.found, grouped.annotations)
    right, neutral, taken = match(grouped.found, grouped.annotations, overlaps, is_crowd)
    starts = np.arange(len(grouped.category_ids) + 1) * len(grouped.image_ids)
    found_bounds = np.searchsorted(grouped.found.groups, starts)
    box_bounds = np.searchsorted(grouped.annotations.groups, starts)
    matched = []
    for place, category_id in enumerate(grouped.category_ids.tolist()):
        rows = np.arange(found_bounds[place], found_bounds[place + 1])
        rows = rows[np.argsort(-grouped.scores[rows], kind="stable")]
        boxes = np.arange(box_bounds[place], box_bounds[place + 1])
        boxes = boxes[~is_crowd[boxes]]
        matched.append(
            MatchedCategory(
                category_id,
                grouped.found_rows[rows],
                right[:, rows],
                neutral[:, rows],
                grouped.annotated_rows[boxes],
                taken[:, boxes],
            )
        )
    return matched
