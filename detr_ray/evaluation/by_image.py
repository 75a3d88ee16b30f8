"""Detections and annotations by image: the input of every analysis other than COCO's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.matching import all_iou


class ImageBoxes(NamedTuple):
    """One image.

    Attributes:
        image_id: its id.
        found: ``[D]`` rows of the detections, from the highest score to the lowest.
        annotated: ``[G]`` rows of the annotations that have a finite box.
        iou: ``[D, G]``; for crowd regions, the share of the detection's area inside.
        is_same: ``[D, G]`` bool, whether detection and annotation have one category.
        is_crowd: ``[G]`` bool.
    """

    image_id: int
    found: np.ndarray
    annotated: np.ndarray
    iou: np.ndarray
    is_same: np.ndarray
    is_crowd: np.ndarray


def images_of(truth: GroundTruth, detections: DetectionTable) -> Iterator[ImageBoxes]:
    """Every image of the ground truth, also those without boxes.

    Equal scores are ordered as in `DetectionTable.sorted`, so that the order of the rows plays no part.
    """
    order = detections.order()
    ids = detections.image_ids[order]
    usable = truth.readable_boxes()
    is_crowd = truth.is_crowd.astype(bool)
    boxes = detections.boxes_xywh_px.astype(np.float64)
    for place, image_id in enumerate(truth.image_ids.tolist()):
        found = order[np.searchsorted(ids, image_id, side="left") : np.searchsorted(ids, image_id, side="right")]
        annotated = np.arange(truth.first_box[place], truth.first_box[place + 1])
        annotated = annotated[usable[annotated]]
        crowd = is_crowd[annotated]
        yield ImageBoxes(
            image_id,
            found,
            annotated,
            all_iou(boxes[found], truth.boxes_xywh_px[annotated].astype(np.float64), crowd),
            detections.category_ids[found][:, None] == truth.category_ids[annotated][None, :],
            crowd,
        )
