"""The quality of scores: precision and recall of the detections above a score, and the best threshold.

A detection is right if it matches an annotated box of its category at IoU 0.5, by COCO's matching; detections of crowd
regions are ignored. For each category, and for all together:

- precision, recall and F1 of the detections with at least a score, over scores;
- the threshold of best F1, with its precision and recall;
- the expected calibration error: how far a score is from the share of right ones among detections of about that score
  (Guo et al. 2017, with 10 bins). Detections below 0.05 are left out: a DETR gives one for each query, and most of them
  have scores near 0, which would hide the others.

Plain numbers in dictionaries: they are kept as JSON beside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_ray.printable import printable

IOU = 0.5
THRESHOLDS = tuple(step / 20 for step in range(21))
"""Scores at which precision, recall and F1 are noted."""
LEAST_CALIBRATED = 0.05
BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Detections that are not ignored, and whether they are right.

    Attributes:
        scores: ``[D]``.
        categories: ``[D]`` index of each one's category.
        is_right: ``[D]`` bool.
        to_find: ``[K]`` annotated boxes of each category.
    """

    scores: np.ndarray
    categories: np.ndarray
    is_right: np.ndarray
    to_find: np.ndarray


def measure_scores(judged: Judged, categories: Mapping[int, str]) -> dict[str, Any]:
    """Measures the quality of the scores of a model's detections.

    Args:
        judged: its detections on a validation set.
        categories: name of each category id, in the order of the indices.

    Returns:
        ``all`` of all categories together, ``categories`` by category id (as text, for JSON). Each has ``boxes``; the
        best ``threshold`` with its ``precision``, ``recall`` and ``f1``; ``calibration_error``; and ``curves`` at
        ``thresholds``. Values of categories without boxes, or without detections, are None.
    """
    of_each = {}
    for place, (category_id, name) in enumerate(categories.items()):
        rows = judged.categories == place
        measured = _measure(judged.scores[rows], judged.is_right[rows], int(judged.to_find[place]))
        of_each[str(category_id)] = {"name": name, **measured}
    return {
        "iou": IOU,
        "thresholds": list(THRESHOLDS),
        "least_calibrated_score": LEAST_CALIBRATED,
        "all": _measure(judged.scores, judged.is_right, int(judged.to_find.sum())),
        "categories": of_each,
    }


def describe_scores(scores: Mapping[str, Any]) -> str:
    """One line for people: the best threshold of all categories together."""
    best = scores["all"]
    if best["threshold"] is None:
        return "no detection is right, so that no score threshold is better than another"
    line = (
        f"best F1 {best['f1']:.3f} (precision {best['precision']:.3f}, recall {best['recall']:.3f} at IoU {IOU}) with "
        f"scores of at least {best['threshold']:.3f}"
    )
    error = best["calibration_error"]
    return line if error is None else f"{line}; calibration error of scores {error:.3f}"


def scores_table(scores: Mapping[str, Any]) -> str:
    """The best threshold of each category, with its precision and recall; best F1 first."""
    rows = sorted(scores["categories"].values(), key=lambda row: (-(row["f1"] or 0.0), row["name"]))
    measured = [row for row in rows if row["threshold"] is not None]
    width = max([len("category"), *(len(printable(row["name"])) for row in measured)])
    lines = [f"{'category':<{width}}  score  precision  recall     F1  calibration error"]
    for row in measured:
        error = "n/a" if row["calibration_error"] is None else f"{row['calibration_error']:.3f}"
        numbers = f"{row['threshold']:.3f}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:.3f}"
        lines.append(f"{printable(row['name']):<{width}}  {numbers}  {error:>17}")
    return "\n".join(lines)


def _measure(scores: np.ndarray, is_right: np.ndarray, to_find: int) -> dict[str, Any]:
    unknown = dict.fromkeys(("threshold", "precision", "recall", "f1", "calibration_error", "curves"))
    if not to_find:
        return {"boxes": 0, **unknown}
    order = np.argsort(-scores, kind="stable")
    scores, is_right = scores[order], is_right[order]
    right = np.cumsum(is_right)
    # Detections with equal scores pass a threshold together, so only the last one of each score counts.
    last = np.flatnonzero(np.diff(scores, append=-1.0) != 0)
    f1 = 2 * right[last] / (last + 1 + to_find)
    measured: dict[str, Any] = {"boxes": to_find, **unknown}
    if len(last) and f1.max() > 0:
        best = int(f1.argmax())  # the highest score of equal ones
        at = int(last[best])
        measured["threshold"] = float(scores[at])
        measured |= _at(int(right[at]), at + 1, to_find)
    measured["calibration_error"] = calibration_error(scores, is_right)
    points = []
    for threshold in THRESHOLDS:
        count = int(np.searchsorted(-scores, -scores.dtype.type(threshold), side="right"))
        points.append(_at(int(right[count - 1]) if count else 0, count, to_find))
    measured["curves"] = {name: [point[name] for point in points] for name in ("precision", "recall", "f1")}
    return measured


def _at(right: int, count: int, to_find: int) -> dict[str, float | None]:
    """Precision (None without detections), recall and F1, from the numbers of right detections and of all."""
    return {
        "precision": right / count if count else None,
        "recall": right / to_find,
        "f1": 2 * right / (count + to_find),
    }


def calibration_error(scores: np.ndarray, is_right: np.ndarray) -> float | None:
    """The expected calibration error of detections; None if none has a score of at least `LEAST_CALIBRATED`.

    Args:
        scores: ``[D]``.
        is_right: ``[D]`` bool.
    """
    counted = scores >= LEAST_CALIBRATED
    scores, is_right = scores[counted].astype(np.float64), is_right[counted]
    if not len(scores):
        return None
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    # Of each bin: its share of the detections, times the distance of its mean score from its share of right ones.
    distances = np.bincount(bins, weights=scores - is_right, minlength=BINS)
    return float(np.abs(distances).sum() / len(scores))
