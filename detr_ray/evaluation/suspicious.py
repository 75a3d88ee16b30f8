"""Annotations that look wrong, by what a trained detector finds with confidence: for people who clean data.

* an object without annotation: a confident detection that overlaps nothing annotated;
* another category: a confident detection of another category than the annotation that it overlaps;
* a box that does not fit: a confident detection of the same category that overlaps an annotation a little;
* never found: an annotation that no detection overlaps, not even one of little confidence.

Good suspicions come from a detector that did not train on the images: it learns mistakes by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from detr_ray.evaluation.by_image import ImageBoxes, images_of
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth

Kind = Literal["no annotation", "other category", "box does not fit", "never found"]

_OVERLAP = 0.5
_LITTLE_OVERLAP = 0.1


@dataclass(frozen=True)
class Suspicion:
    """Something that looks wrong.

    Attributes:
        kind: what.
        image_id: on which image.
        strength: 0..1; the higher, the more it looks wrong.
        detection: row of the detection that says so; None where none does.
        annotation: row of the annotation; None where there is none.
    """

    kind: Kind
    image_id: int
    strength: float
    detection: int | None
    annotation: int | None


def find_suspicious(truth: GroundTruth, detections: DetectionTable, confident: float = 0.7) -> list[Suspicion]:
    """What looks wrong, the strongest first. Crowd regions are left alone, and whatever lies inside of one.

    Args:
        truth: the annotations.
        detections: in any order, those of little confidence included.
        confident: score from which a detection is taken for right; an annotation is never found where the detections
            that overlap it have less than 1 less this score.
    """
    found: list[Suspicion] = []
    for image in images_of(truth, detections):
        found += _of_image(image, detections.scores[image.found].astype(float), confident)
    return sorted(found, key=lambda one: (-one.strength, one.image_id, one.annotation or -1, one.detection or -1))


def _of_image(image: ImageBoxes, scores: np.ndarray, confident: float) -> list[Suspicion]:
    found: list[Suspicion] = []
    accused: set[int] = set()
    in_crowd = (image.iou * image.is_crowd > _OVERLAP).any(axis=1)
    plain = np.flatnonzero(~image.is_crowd)
    iou, is_same = image.iou[:, plain], image.is_same[:, plain]
    supported = _best(np.where(is_same & (iou >= _OVERLAP), scores[:, None], 0.0))
    for place in np.flatnonzero((scores >= confident) & ~in_crowd).tolist():
        near = np.flatnonzero(iou[place] >= _OVERLAP)
        if is_same[place, near].any():
            continue
        kind: Kind = "no annotation"
        annotation, strength = None, float(scores[place])
        free = np.array([column for column in near.tolist() if supported[column] < scores[place]], dtype=np.int64)
        little = np.flatnonzero((iou[place] >= _LITTLE_OVERLAP) & is_same[place] & (supported < confident))
        if len(free):
            kind, annotation = "other category", int(free[iou[place, free].argmax()])
            strength *= 1 - float(supported[annotation])
        elif len(near):
            continue  # the annotation that it overlaps is found better by another one
        elif len(little):
            kind, annotation = "box does not fit", int(little[iou[place, little].argmax()])
        if annotation is not None:
            if annotation in accused:
                continue
            accused.add(annotation)
        row = None if annotation is None else int(image.annotated[plain[annotation]])
        found.append(Suspicion(kind, image.image_id, strength, int(image.found[place]), row))
    overlapped = _best(np.where(iou >= _OVERLAP, scores[:, None], 0.0))
    for column in np.flatnonzero(overlapped < 1 - confident).tolist():
        if column not in accused:
            row = int(image.annotated[plain[column]])
            found.append(Suspicion("never found", image.image_id, 1 - float(overlapped[column]), None, row))
    return found


def _best(values: np.ndarray) -> np.ndarray:
    """The largest of each column; 0 where there are no rows."""
    best: np.ndarray = values.max(axis=0, initial=0.0)
    return best
