"""The outcome of each detection and annotation at one IoU (matched, confused, false, missed), and a confusion matrix.

Detections are taken from the highest score to the lowest. Each first takes the free annotation of its own category that
it overlaps most. The remaining ones are then paired across categories: these are confused. Crowd regions are neither
found nor missed, and detections inside a crowd region of their category are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from detr_ray.evaluation.by_image import ImageBoxes, images_of
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth

_LEAST_IOU = 0.5


class Outcome(IntEnum):
    """The outcome of a detection or an annotation."""

    MATCHED = 0
    CONFUSED = 1
    FALSE = 2
    MISSED = 3
    IGNORED = 4


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all detections and annotations.

    Attributes:
        found: ``[D]`` `Outcome` of each detection; those below the score are IGNORED.
        annotated: ``[A]`` `Outcome` of each annotation; crowd regions are IGNORED.
        partner: ``[D]`` row of the annotation that a matched or confused detection is paired with; -1 for none.
        iou: ``[D]`` IoU of the pair; 0 for none.
    """

    found: np.ndarray
    annotated: np.ndarray
    partner: np.ndarray
    iou: np.ndarray


def find_outcomes(truth: GroundTruth, detections: DetectionTable, score: float) -> Outcomes:
    """Pairs detections and annotations with an IoU of at least 0.5.

    Args:
        truth: the annotations.
        detections: in any order.
        score: detections with lower scores are ignored.
    """
    outcomes = Outcomes(
        found=np.full(len(detections), Outcome.IGNORED),
        annotated=np.where(truth.is_crowd.astype(bool), Outcome.IGNORED, Outcome.MISSED),
        partner=np.full(len(detections), -1),
        iou=np.zeros(len(detections)),
    )
    outcomes.annotated[~truth.readable_boxes()] = Outcome.IGNORED
    for image in images_of(truth, detections.select(kept := np.flatnonzero(detections.scores >= score))):
        _pair(image, kept[image.found], outcomes)
    return outcomes


def _pair(image: ImageBoxes, found: np.ndarray, outcomes: Outcomes) -> None:
    """Sets the outcomes of one image."""
    outcomes.found[found] = Outcome.FALSE
    free = ~image.is_crowd
    for of_same, outcome in ((True, Outcome.MATCHED), (False, Outcome.CONFUSED)):
        for place, row in enumerate(found.tolist()):
            if outcomes.found[row] != Outcome.FALSE:
                continue
            overlap = np.where(free & (image.is_same[place] == of_same), image.iou[place], -1.0)
            if not overlap.size or overlap.max() < _LEAST_IOU:
                continue
            best = int(overlap.argmax())
            free[best] = False
            outcomes.found[row] = outcome
            outcomes.annotated[image.annotated[best]] = outcome
            outcomes.partner[row], outcomes.iou[row] = image.annotated[best], overlap[best]
    in_crowd = (image.is_crowd & image.is_same & (image.iou >= _LEAST_IOU)).any(axis=1)
    outcomes.found[found[in_crowd & (outcomes.found[found] == Outcome.FALSE)]] = Outcome.IGNORED


def confusion_matrix(truth: GroundTruth, detections: DetectionTable, outcomes: Outcomes) -> np.ndarray:
    """How often annotations of each category were detected as each category.

    Args:
        truth: the annotations.
        detections: the detections.
        outcomes: of both.

    Returns:
        ``[K + 1, K + 1]`` int64: row, the annotated category in the order of ``truth.categories``; column, the
        detected one. The last column counts annotations that were missed, the last row detections where nothing is
        annotated.
    """
    place_of = {category_id: place for place, (category_id, _) in enumerate(truth.categories)}
    none = len(place_of)
    counts = np.zeros((none + 1, none + 1), np.int64)
    for row, outcome in enumerate(outcomes.found.tolist()):
        if outcome == Outcome.IGNORED:
            continue
        column = place_of.get(int(detections.category_ids[row]), none)
        partner = int(outcomes.partner[row])
        counts[none if partner < 0 else place_of.get(int(truth.category_ids[partner]), none), column] += 1
    for row in np.flatnonzero(outcomes.annotated == Outcome.MISSED).tolist():
        counts[place_of.get(int(truth.category_ids[row]), none), none] += 1
    return counts
