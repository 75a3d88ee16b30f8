"""What AP50 is lost to: six kinds of errors, as Bolya et al. 2020 (TIDE) tell them apart.

Each wrong detection is of one kind, by its overlap with the annotations of its image:

* localisation: its largest overlap with an annotation of its own category is 0.1 to 0.5;
* classification: it overlaps an annotation of another category by 0.5 or more;
* duplicate: it overlaps one of its own category by 0.5 or more, which a detection with a higher score matches;
* both: it overlaps one of another category by 0.1 to 0.5;
* background: it overlaps no annotation by 0.1;

An annotation is missed if neither a right detection nor an error of the first two kinds belongs to it.

The cost of a kind is given in two ways: how much AP50 would rise if only this kind were corrected, as in TIDE; and how
much it rises when the kinds are corrected one after another; these add up to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from detr_ray.evaluation.by_image import ImageBoxes, images_of
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.matched import MatchedCategory, match_all
from detr_ray.evaluation.precision_recall import interpolated_precision

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""In the order in which they are corrected."""

_BACKGROUND_IOU = 0.1
_FOREGROUND_IOU = 0.5


@dataclass(frozen=True)
class ErrorBreakdown:
    """What AP50 is lost to.

    Attributes:
        ap50: COCO's AP50.
        counts: kind -> number of detections; of annotations for ``missed``.
        alone: kind -> how much AP50 rises if only this kind is corrected.
        in_turn: kind -> how much it rises when the kinds are corrected one after another; they add up to 1 - ``ap50``.
    """

    ap50: float
    counts: dict[str, int]
    alone: dict[str, float]
    in_turn: dict[str, float]


@dataclass
class _State:
    """Detections and annotations after some kinds of errors were corrected.

    Attributes:
        category: ``[D]`` of each detection.
        is_right: ``[D]`` bool.
        counts: ``[D]`` bool, False for those that were removed or are ignored.
        is_found: ``[A]`` bool.
        is_sought: ``[A]`` bool, False for crowd regions and annotations that were removed.
    """

    category: np.ndarray
    is_right: np.ndarray
    counts: np.ndarray
    is_found: np.ndarray
    is_sought: np.ndarray

    def copy(self) -> _State:
        return _State(*(getattr(self, name).copy() for name in self.__dataclass_fields__))


@dataclass
class _Errors:
    """The kind of each wrong detection (index in `KINDS`, -1 for none), and the annotation that it overlaps."""

    kind: np.ndarray
    target: np.ndarray
    by_score: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def break_down_errors(truth: GroundTruth, detections: DetectionTable) -> ErrorBreakdown:
    """Finds the kinds of all errors, and the cost of each kind.

    Args:
        truth: the annotations.
        detections: in any order.
    """
    matched = match_all(truth, detections)
    scored = {category.category_id for category in matched if category.to_find}
    state = _state_of(truth, detections, matched)
    errors = _kinds_of(truth, detections, state, scored)
    before = _ap50(truth, detections, state, scored)
    alone, in_turn, counts = {}, {}, {}
    mended, reached = state.copy(), before
    for place, kind in enumerate(KINDS):
        alone[kind] = _ap50(truth, detections, _mend(state.copy(), errors, place, truth), scored) - before
        mended = _mend(mended, errors, place, truth)
        risen = _ap50(truth, detections, mended, scored)
        in_turn[kind], reached = risen - reached, risen
        counts[kind] = int((errors.kind == place).sum())
    counts["missed"] = int(_missed(state, errors).sum())
    return ErrorBreakdown(before, counts, alone, in_turn)


def _state_of(truth: GroundTruth, detections: DetectionTable, matched: list[MatchedCategory]) -> _State:
    state = _State(
        detections.category_ids.copy(),
        *(np.zeros(len(detections), bool) for _ in range(2)),
        *(np.zeros(len(truth.category_ids), bool) for _ in range(2)),
    )
    for category in matched:
        if category.to_find:  # COCO does not score the others
            state.is_right[category.found] = category.is_right[0]
            state.counts[category.found] = ~category.is_neutral[0]
            state.is_found[category.annotated] = category.is_found[0]
            state.is_sought[category.annotated] = True
    return state


def _kinds_of(truth: GroundTruth, detections: DetectionTable, state: _State, scored: set[int]) -> _Errors:
    errors = _Errors(np.full(len(detections), -1), np.full(len(detections), -1), detections.order())
    errors.by_score = errors.by_score[np.argsort(-detections.scores[errors.by_score], kind="stable")]
    for image in images_of(truth, detections):
        wrong = np.flatnonzero(state.counts[image.found] & ~state.is_right[image.found])
        if len(wrong):
            errors.kind[image.found[wrong]], errors.target[image.found[wrong]] = _of_image(image, wrong)
    return errors


def _of_image(image: ImageBoxes, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kinds = np.full(len(wrong), KINDS.index("background"))
    targets = np.full(len(wrong), -1)
    plain = ~image.is_crowd
    if not plain.any():
        return kinds, targets
    annotated = image.annotated[plain]
    iou, is_same = image.iou[wrong][:, plain], image.is_same[wrong][:, plain]
    same, other = np.where(is_same, iou, -1.0), np.where(is_same, -1.0, iou)
    best_same, best_other = same.max(axis=1), other.max(axis=1)
    both = best_other >= _BACKGROUND_IOU
    classification = best_other >= _FOREGROUND_IOU
    localisation = (best_same >= _BACKGROUND_IOU) & (best_same < _FOREGROUND_IOU)
    duplicate = (best_same >= _FOREGROUND_IOU) & ~classification
    # The later rule wins: localisation before classification before the others, as TIDE has it.
    for name, applies in (("both", both), ("duplicate", duplicate), ("classification", classification)):
        kinds[applies] = KINDS.index(name)
    kinds[localisation] = KINDS.index("localisation")
    points = np.isin(kinds, [KINDS.index("classification"), KINDS.index("localisation")])
    nearest = np.where(localisation, same.argmax(axis=1), other.argmax(axis=1))
    targets[points] = annotated[nearest[points]]
    return kinds, targets


def _missed(state: _State, errors: _Errors) -> np.ndarray:
    """``[A]`` bool, annotations that are neither found nor the subject of another error."""
    missed = state.is_sought & ~state.is_found
    missed[errors.target[errors.target >= 0]] = False
    return missed


def _mend(state: _State, errors: _Errors, place: int, truth: GroundTruth) -> _State:
    """Corrects the errors of one kind, those with the highest score first."""
    kind = KINDS[place]
    if kind == "missed":
        state.is_sought &= ~_missed(state, errors)
        return state
    rows = errors.by_score[errors.kind[errors.by_score] == place]
    if kind not in ("classification", "localisation"):
        state.counts[rows] = False
        return state
    for row in rows.tolist():
        target = int(errors.target[row])
        if state.is_found[target] or not state.is_sought[target]:
            state.counts[row] = False  # another detection finds the annotation already
            continue
        state.is_found[target] = state.is_right[row] = True
        state.category[row] = truth.category_ids[target]
    return state


def _ap50(truth: GroundTruth, detections: DetectionTable, state: _State, scored: set[int]) -> float:
    order = detections.order()
    order = order[np.argsort(-detections.scores[order], kind="stable")]
    order = order[state.counts[order]]
    sought = truth.category_ids[state.is_sought]
    precisions = []
    for category_id in sorted(scored):
        rows = order[state.category[order] == category_id]
        right = state.is_right[rows][None]
        to_find = int((sought == category_id).sum())
        if to_find:
            precisions.append(float(interpolated_precision(right, ~right, to_find).mean()))
        else:  # all of them were missed, and misses are corrected
            precisions.append(float(not len(rows)))
    return float(np.mean(precisions)) if precisions else 0.0
