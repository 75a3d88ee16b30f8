"""Finds annotations that look wrong by a trained detector's detections, for cleaning data.

* no annotation: a detection where nothing is annotated;
* other category: a detection of another category than the annotation that it overlaps;
* box does not fit: a detection of the same category that overlaps an annotation a little;
* never found: an annotation that no detection overlaps, not even one with a low score.

The strength of a suspicion depends on how reliable such detections are on this validation set, assuming that most of
its annotations are right: of all detections of the category with at least the same score, the share that agrees with
the annotations in the same respect (object, category or box). So a detector that often confuses two categories gives
few suspicions about them, and one that has learnt little gives none.

The detector should not have been trained on these images, because it memorises wrong annotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from detr_ray.evaluation.by_image import ImageBoxes, images_of
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.matching import all_iou

Kind = Literal["no annotation", "other category", "box does not fit", "never found"]

LEAST_STRENGTH = 0.5
_OVERLAP = 0.5
_LITTLE_OVERLAP = 0.1
_SEEN = 0.4
"""Least score of a detection for an annotation that it overlaps to count as seen."""
_OTHERS_WEIGHT = 8
"""Weight, in detections, of all categories together when one category is measured, which may have few."""


@dataclass(frozen=True)
class Suspicion:
    """Something that looks wrong.

    Attributes:
        kind: kind of the suspicion.
        image_id: id of the image.
        strength: 0..1; higher values are more suspicious.
        detection: row of the detection that contradicts the annotation; None if there is none.
        annotation: row of the annotation; None if one is missing.
    """

    kind: Kind
    image_id: int
    strength: float
    detection: int | None
    annotation: int | None


def find_suspicious(truth: GroundTruth, detections: DetectionTable, least: float = LEAST_STRENGTH) -> list[Suspicion]:
    """All suspicions, the strongest first. Crowd regions, and everything inside them, are ignored.

    Args:
        truth: the annotations.
        detections: in any order, including those with low scores.
        least: the least strength. Detections with a lower score are ignored.
    """
    evidence = _Evidence.of(truth, detections)
    found = [one for image in images_of(truth, detections) for one in _of_image(image, detections, evidence, least)]
    return sorted(found, key=lambda one: (-one.strength, one.image_id, one.annotation or -1, one.detection or -1))


@dataclass(frozen=True)
class _Evidence:
    """How reliable single detections and annotations are, measured on the whole validation set.

    Attributes:
        scores: ``[D]`` of the detections.
        on_object: ``[D]`` of similar detections, the share that overlaps an annotation.
        of_category: ``[D]`` of those that overlap one, the share with the annotation's category.
        of_extent: ``[D]`` of similar detections near an annotation of their category, the share that overlaps it well.
        supported: ``[A]`` the best score of a detection of its category that overlaps the annotation well.
        overlapped: ``[A]`` the same for detections of any category.
        seen: ``[A]`` the share of annotations of its category that count as seen.
    """

    scores: np.ndarray
    on_object: np.ndarray
    of_category: np.ndarray
    of_extent: np.ndarray
    supported: np.ndarray
    overlapped: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, truth: GroundTruth, detections: DetectionTable) -> _Evidence:
        scores, categories = detections.scores.astype(float), detections.category_ids
        on_any, on_same, near_same, counts = (np.zeros(len(detections), bool) for _ in range(4))
        supported, overlapped = np.zeros(len(truth.category_ids)), np.zeros(len(truth.category_ids))
        for image in images_of(truth, detections):
            iou, is_same, annotated = _plain(image)
            well, own = iou >= _OVERLAP, scores[image.found][:, None]
            on_any[image.found], on_same[image.found] = well.any(axis=1), (well & is_same).any(axis=1)
            near_same[image.found] = ((iou >= _LITTLE_OVERLAP) & is_same).any(axis=1)
            counts[image.found] = ~_in_crowd(image)
            supported[annotated] = _best(np.where(well & is_same, own, 0.0))
            overlapped[annotated] = _best(np.where(well, own, 0.0))
        plain = truth.readable_boxes() & ~truth.is_crowd.astype(bool)
        return cls(
            scores,
            _reliability(scores, categories, on_any, counts),
            _reliability(scores, categories, on_same, counts & on_any),
            _reliability(scores, categories, on_same, counts & near_same),
            supported,
            overlapped,
            _shares(truth.category_ids, overlapped >= _SEEN, plain),
        )


def _of_image(image: ImageBoxes, detections: DetectionTable, evidence: _Evidence, least: float) -> Iterator[Suspicion]:
    iou, is_same, annotated = _plain(image)
    supported, overlapped = evidence.supported[annotated], evidence.overlapped[annotated]
    accused: set[int] = set()
    explained = np.zeros(len(image.found), bool)  # by a suspicion from a better detection at the same place
    scores = evidence.scores[image.found]
    with_same = (iou >= _OVERLAP) & is_same
    for place in np.flatnonzero((scores >= least) & ~_in_crowd(image) & ~with_same.any(axis=1)).tolist():
        if explained[place]:
            continue
        row, score = int(image.found[place]), float(scores[place])
        well = np.flatnonzero(iou[place] >= _OVERLAP)
        near = np.flatnonzero((iou[place] >= _LITTLE_OVERLAP) & is_same[place] & (overlapped < score / 2))
        kind: Kind = "no annotation"
        column = None
        if len(well):
            # No suspicion if a detection of the annotation's own category has a higher score.
            column = int(well[iou[place, well].argmax()])
            margin = max(0.0, 1 - supported[column] / score)
            # Squared, since a wrong category is the most frequent mistake of detectors.
            kind, strength = "other category", evidence.of_category[row] ** 2 * score * margin**2 * iou[place, column]
        elif len(near):
            column = int(near[iou[place, near].argmax()])
            kind, strength = "box does not fit", evidence.of_extent[row] * score
        else:
            strength = evidence.on_object[row] * score * (1 - iou[place].max(initial=0.0))
        if strength < least or column in accused:
            continue
        if column is not None:
            accused.add(column)
        explained |= _overlaps(detections, image.found, row)
        yield Suspicion(kind, image.image_id, float(strength), row, None if column is None else int(annotated[column]))
    strengths = evidence.seen[annotated] * (1 - overlapped / _SEEN)
    for column in np.flatnonzero(strengths >= least).tolist():
        if column not in accused:
            yield Suspicion("never found", image.image_id, float(strengths[column]), None, int(annotated[column]))


def _plain(image: ImageBoxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU, whether categories are the same, and rows, of the annotations that are no crowd regions."""
    plain = np.flatnonzero(~image.is_crowd)
    return image.iou[:, plain], image.is_same[:, plain], image.annotated[plain]


def _in_crowd(image: ImageBoxes) -> np.ndarray:
    in_crowd: np.ndarray = (image.iou * image.is_crowd > _OVERLAP).any(axis=1)
    return in_crowd


def _overlaps(detections: DetectionTable, rows: np.ndarray, row: int) -> np.ndarray:
    """Which of some detections overlap one of them well."""
    boxes = detections.boxes_xywh_px.astype(float)
    overlap: np.ndarray = all_iou(boxes[rows], boxes[[row]], np.zeros(1, bool))[:, 0] >= _OVERLAP
    return overlap


def _best(values: np.ndarray) -> np.ndarray:
    """The largest of each column; 0 where there are no rows."""
    best: np.ndarray = values.max(axis=0, initial=0.0)
    return best


def _reliability(scores: np.ndarray, categories: np.ndarray, is_right: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[N]`` share of right ones among the others with at least this score, mainly of the same category.

    Args:
        scores: ``[N]``.
        categories: ``[N]``.
        is_right: ``[N]`` bool.
        counts: ``[N]`` bool, those that are counted.
    """
    right, others = _from_the_top(scores, is_right & counts, counts, scores)
    of_all = (right + 1) / (others + 2)
    share = of_all.copy()
    for category in np.unique(categories).tolist():
        own = categories == category
        right, others = _from_the_top(scores, is_right & counts & own, counts & own, scores[own])
        share[own] = (right + _OTHERS_WEIGHT * of_all[own]) / (others + _OTHERS_WEIGHT)
    return share


def _from_the_top(
    scores: np.ndarray, is_right: np.ndarray, counts: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many right ones, and how many in all but one, have at least each of some scores."""
    right, all_ = np.sort(scores[is_right]), np.sort(scores[counts])
    in_all = len(all_) - np.searchsorted(all_, at)
    return len(right) - np.searchsorted(right, at), np.maximum(in_all - 1, 0)


def _shares(categories: np.ndarray, is_seen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[A]`` share of seen annotations in the category of each; it is itself left out if it is not seen."""
    of_all = is_seen[counts].mean() if counts.any() else 0.0
    share = np.zeros(len(categories))
    for category in np.unique(categories).tolist():
        own = counts & (categories == category)
        share[categories == category] = (is_seen[own].sum() + _OTHERS_WEIGHT * of_all) / (
            max(own.sum() - 1, 0) + _OTHERS_WEIGHT
        )
    return share.clip(max=1.0)
