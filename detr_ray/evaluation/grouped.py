"""Detections and annotations sorted into groups, a category in an image each, as COCO's matching takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.matching import Annotations, Found
from detr_ray.evaluation.precision_recall import MAX_DETECTIONS


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """The detections and annotations that are scored, by category, then by image.

    Attributes:
        found: ``D`` detections; the best 100 of each group.
        annotations: ``G`` boxes.
        scores: ``[D]``.
        ranks: ``[D]`` rank of each detection in its group, by score, from 0.
        found_rows: ``[D]`` rows of the table of detections.
        annotated_rows: ``[G]`` rows of the ground truth.
        image_ids: rising.
        category_ids: rising.
    """

    found: Found
    annotations: Annotations
    scores: np.ndarray
    ranks: np.ndarray
    found_rows: np.ndarray
    annotated_rows: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray


def group_by_category(ground_truth: GroundTruth, detections: DetectionTable) -> Grouped:
    """Sorts detections and annotations; those of unknown images or categories are left out.

    Args:
        ground_truth: the annotations.
        detections: in any order.
    """
    image_ids = np.unique(ground_truth.image_ids)
    category_ids = np.unique(np.array([category_id for category_id, _ in ground_truth.categories], dtype=np.int64))
    order = detections.order()
    groups = _groups(detections.image_ids[order], detections.category_ids[order], image_ids, category_ids)
    rows = _by_group(groups)
    ranks = _ranks(groups[rows])
    rows, ranks = rows[ranks < MAX_DETECTIONS[-1]], ranks[ranks < MAX_DETECTIONS[-1]]
    found_rows = order[rows]
    boxes = detections.boxes_xywh_px[found_rows].astype(np.float64)
    found = Found(groups[rows], boxes, boxes[:, 2] * boxes[:, 3])

    groups = _groups(ground_truth.image_of_box(), ground_truth.category_ids, image_ids, category_ids)
    groups[~ground_truth.readable_boxes()] = -1
    annotated = _by_group(groups)
    annotations = Annotations(
        groups[annotated],
        ground_truth.boxes_xywh_px[annotated].astype(np.float64),
        ground_truth.areas[annotated].astype(np.float64),
        ground_truth.is_crowd[annotated].astype(bool),
    )
    return Grouped(
        found, annotations, detections.scores[found_rows], ranks, found_rows, annotated, image_ids, category_ids
    )


def _groups(images: np.ndarray, categories: np.ndarray, image_ids: np.ndarray, category_ids: np.ndarray) -> np.ndarray:
    """Group of each row, ``category * images + image`` (both counted from 0); -1 if the row is not scored."""
    image, image_known = _places(images, image_ids)
    category, category_known = _places(categories, category_ids)
    return np.where(image_known & category_known, category * len(image_ids) + image, -1)


def _places(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each value in the sorted array ``known``, and whether the value is in it."""
    if not len(known):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return places, known[places] == values


def _by_group(groups: np.ndarray) -> np.ndarray:
    """The rows that have a group, sorted by group; within a group in their old order."""
    order = np.argsort(groups, kind="stable")
    return order[np.searchsorted(groups, 0, sorter=order) :]


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Index of each row within its group; ``groups`` is sorted."""
    places = np.arange(len(groups))
    is_first = np.diff(groups, prepend=-1) != 0
    return places - np.maximum.accumulate(np.where(is_first, places, 0))
