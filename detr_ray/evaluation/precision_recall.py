"""COCO's precision and recall curves from matched detections."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from detr_ray.evaluation.matching import IOU_THRESHOLDS, Annotations, Found, find_overlaps, match
from detr_ray.evaluation.score_quality import Judged

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall values at which precision is taken."""

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of a box's area in pixels, both ends included."""

MAX_DETECTIONS = (1, 10, 100)
"""Largest numbers of detections for each image and category: AR1, AR10 and AR100. All other metrics use 100."""


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Precision and recall for ``T`` IoU thresholds, ``R`` recalls, ``K`` categories; -1 for categories without boxes.

    Attributes:
        precision: area -> ``[T, R, K]``, the highest precision at or above each recall.
        recall: area -> ``[T, K]``, recall with up to 100 detections for each image and category.
        recall_of_first: number of detections -> ``[T, K]``, recall with this number of detections, all areas.
        judged: the detections of all areas that are not ignored at the lowest IoU threshold, to measure their scores.
    """

    precision: dict[str, np.ndarray]
    recall: dict[str, np.ndarray]
    recall_of_first: dict[int, np.ndarray]
    judged: Judged


def precision_recall_curves(
    found: Found, annotations: Annotations, scores: np.ndarray, ranks: np.ndarray, num_images: int, num_categories: int
) -> Curves:
    """Matches detections with annotations and computes the curves.

    Args:
        found: detections; a group is ``category * num_images + image``, both counted from 0.
        annotations: annotated boxes, in the same groups.
        scores: ``[D]`` scores of the detections.
        ranks: ``[D]`` rank of each detection in its group, by score, from 0.
        num_images: number of images.
        num_categories: number of categories.
    """
    category_starts = np.arange(num_categories + 1) * num_images
    bounds = np.searchsorted(found.groups, category_starts)
    slices = [slice(begin, end) for begin, end in pairwise(bounds.tolist())]
    by_score = [np.argsort(-scores[rows], kind="stable") for rows in slices]
    category_of_box = annotations.groups // max(num_images, 1)
    overlaps = find_overlaps(found, annotations)

    shape = (len(IOU_THRESHOLDS), num_categories)
    precision = {area: np.full((shape[0], len(RECALLS), shape[1]), -1.0) for area in AREAS}
    recall = {area: np.full(shape, -1.0) for area in AREAS}
    recall_of_first = {limit: np.full(shape, -1.0) for limit in MAX_DETECTIONS}
    for area, (low, high) in AREAS.items():
        ignored = annotations.outside(low, high)
        to_find = np.bincount(category_of_box[~ignored], minlength=num_categories)
        right, neutral, _ = match(found, annotations, overlaps, ignored)
        wrong = ~(right | neutral | ((found.areas < low) | (found.areas > high)))
        for k in np.flatnonzero(to_find):
            rows, order = slices[k], by_score[k]
            precision[area][:, :, k] = interpolated_precision(
                right[:, rows][:, order], wrong[:, rows][:, order], to_find[k]
            )
            recall[area][:, k] = right[:, rows].sum(axis=1) / to_find[k]
            if area == "all":
                for limit, of_first in recall_of_first.items():
                    of_first[:, k] = right[:, rows][:, ranks[rows] < limit].sum(axis=1) / to_find[k]
        if area == "all":
            counts = ~neutral[0]
            category_of_found = found.groups[counts] // max(num_images, 1)
            judged = Judged(scores[counts], category_of_found, right[0, counts], to_find)
    return Curves(precision, recall, recall_of_first, judged)


def interpolated_precision(right: np.ndarray, wrong: np.ndarray, to_find: int) -> np.ndarray:
    """Precision at `RECALLS`, ``[T, R]``; 0 for recalls that are not reached.

    Args:
        right: ``[T, D]`` bool, detections of one category that are right, from the highest score to the lowest.
        wrong: ``[T, D]`` bool, those that are wrong; the others are ignored.
        to_find: annotated boxes of the category, at least one.
    """
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
