"""From detections that found something or not to COCO's precisions and recalls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from detr_ray.evaluation.matching import IOU_THRESHOLDS, Annotations, Found, find_overlaps, match

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is looked up."""

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of a box's area in pixels, both ends included."""

MAX_DETECTIONS = (1, 10, 100)
"""Detections of an image and category that count; the last is the limit of everything but the recalls."""


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """What the twelve numbers are means of; -1 where a category has no box to find.

    Attributes:
        precision: area -> ``[T, R, K]``, the best precision at or beyond a recall, at an IoU threshold, of a category.
        recall: area -> ``[T, K]``, recall of up to 100 detections of an image and category.
        recall_of_first: number of detections -> ``[T, K]``, recall of so many of them, over all areas.
    """

    precision: dict[str, np.ndarray]
    recall: dict[str, np.ndarray]
    recall_of_first: dict[int, np.ndarray]


def precision_recall_curves(
    found: Found, annotations: Annotations, scores: np.ndarray, ranks: np.ndarray, num_images: int, num_categories: int
) -> Curves:
    """Matches and counts.

    Args:
        found: detections; a group is ``category * num_images + image``, both counted from 0.
        annotations: boxes in the same groups.
        scores: ``[D]`` of the detections.
        ranks: ``[D]`` their places within their groups, by score.
        num_images: images that are scored.
        num_categories: categories that are scored.
    """
    category_starts = np.arange(num_categories + 1) * num_images
    bounds = np.searchsorted(found.groups, category_starts)
    slices = [slice(begin, end) for begin, end in pairwise(bounds.tolist())]
    by_score = [np.argsort(-scores[rows], kind="stable") for rows in slices]
    category_of_box = annotations.groups // max(num_images, 1)
    overlaps = find_overlaps(found, annotations)

    shape = (len(IOU_THRESHOLDS), num_categories)
    curves = Curves(
        precision={area: np.full((shape[0], len(RECALLS), shape[1]), -1.0) for area in AREAS},
        recall={area: np.full(shape, -1.0) for area in AREAS},
        recall_of_first={limit: np.full(shape, -1.0) for limit in MAX_DETECTIONS},
    )
    for area, (low, high) in AREAS.items():
        ignored = annotations.outside(low, high)
        to_find = np.bincount(category_of_box[~ignored], minlength=num_categories)
        right, neutral = match(found, annotations, overlaps, ignored)
        wrong = ~(right | neutral | ((found.areas < low) | (found.areas > high)))
        for k in np.flatnonzero(to_find):
            rows, order = slices[k], by_score[k]
            curves.precision[area][:, :, k] = _precision(right[:, rows][:, order], wrong[:, rows][:, order], to_find[k])
            curves.recall[area][:, k] = right[:, rows].sum(axis=1) / to_find[k]
            if area == "all":
                for limit, recall in curves.recall_of_first.items():
                    recall[:, k] = right[:, rows][:, ranks[rows] < limit].sum(axis=1) / to_find[k]
    return curves


def _precision(right: np.ndarray, wrong: np.ndarray, to_find: int) -> np.ndarray:
    """``[T, R]`` from ``[T, D]`` in the order of the scores; 0 for a recall that is not reached."""
    num_right = np.cumsum(right, axis=1).astype(np.float64)
    num_wrong = np.cumsum(wrong, axis=1).astype(np.float64)
    recall = num_right / to_find
    precision = num_right / (num_wrong + num_right + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_recalls = np.zeros((len(right), len(RECALLS)))
    for t in range(len(right)):
        places = np.searchsorted(recall[t], RECALLS, side="left")
        reached = places < recall.shape[1]
        at_recalls[t, reached] = envelope[t, places[reached]]
    return at_recalls
