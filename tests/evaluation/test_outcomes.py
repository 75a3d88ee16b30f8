"""What became of detections and annotations, against plain counting in loops."""

from __future__ import annotations

import numpy as np
import pytest
from test_coco_metrics import detections, ground_truth, noisy_detections

from detr_ray.evaluation import DetectionTable, GroundTruth
from detr_ray.evaluation.by_image import images_of
from detr_ray.evaluation.outcomes import Outcome, confusion_matrix, find_outcomes

A, B = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 60.0, 60.0]


def random_truth(seed: int, images: int = 12) -> GroundTruth:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, images)
    boxes = [np.concatenate([rng.uniform(0, 250, (n, 2)), rng.uniform(20, 120, (n, 2))], axis=1) for n in counts]
    return ground_truth(
        [one.tolist() for one in boxes],
        [rng.integers(1, 4, n).tolist() for n in counts],
        [(rng.random(n) < 0.1).tolist() for n in counts],
        categories=((1, "cat"), (2, "dog"), (3, "cow")),
    )


def iou_of(a: np.ndarray, b: np.ndarray, is_crowd: bool) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] if is_crowd else a[2] * a[3] + b[2] * b[3] - both)


def plain_confusions(truth: GroundTruth, found: DetectionTable, score: float) -> np.ndarray:
    """Image by image and detection by detection."""
    counts = np.zeros((4, 4), int)
    for place, image_id in enumerate(truth.image_ids):
        annotated = list(range(truth.first_box[place], truth.first_box[place + 1]))
        free = [row for row in annotated if not truth.is_crowd[row]]
        rows = [row for row in range(len(found)) if found.image_ids[row] == image_id and found.scores[row] >= score]
        left = sorted(rows, key=lambda row: -found.scores[row])
        for same in (True, False):
            for row in list(left):
                best, best_iou = None, 0.5
                for box in free:
                    if (truth.category_ids[box] == found.category_ids[row]) != same:
                        continue
                    overlap = iou_of(found.boxes_xywh_px[row].astype(float), truth.boxes_xywh_px[box], False)
                    if overlap >= best_iou and (best is None or overlap > best_iou):
                        best, best_iou = box, overlap
                if best is not None:
                    free.remove(best)
                    left.remove(row)
                    counts[truth.category_ids[best] - 1, found.category_ids[row] - 1] += 1
        for row in left:
            if not any(
                truth.is_crowd[box]
                and truth.category_ids[box] == found.category_ids[row]
                and iou_of(found.boxes_xywh_px[row].astype(float), truth.boxes_xywh_px[box], True) >= 0.5
                for box in annotated
            ):
                counts[3, found.category_ids[row] - 1] += 1
        for box in free:
            counts[truth.category_ids[box] - 1, 3] += 1
    return counts


@pytest.mark.parametrize("score", [0.0, 0.3, 0.8])
def test_confusions_are_those_of_a_plain_count(score: float) -> None:
    for seed in range(6):
        truth = random_truth(seed)
        found = noisy_detections(truth, seed)
        outcomes = find_outcomes(truth, found, score)
        counts = confusion_matrix(truth, found, outcomes)
        assert counts.tolist() == plain_confusions(truth, found, score).tolist()
        assert counts[:3].sum() == (~truth.is_crowd).sum(), "every annotation is counted once"


def test_each_outcome() -> None:
    truth = ground_truth([[A, B], [A]], [[1, 1], [2]], [[False, False], [True]])
    found = detections(
        [(10, 1, A, 0.9), (10, 1, A, 0.8), (10, 2, B, 0.7), (11, 2, [12, 12, 5, 5], 0.6), (11, 1, B, 0.1)]
    )
    outcomes = find_outcomes(truth, found, 0.5)
    assert [Outcome(value).name for value in outcomes.found] == ["MATCHED", "FALSE", "CONFUSED", "IGNORED", "IGNORED"]
    assert [Outcome(value).name for value in outcomes.annotated] == ["MATCHED", "CONFUSED", "IGNORED"]
    assert outcomes.partner.tolist() == [0, -1, 1, -1, -1] and outcomes.iou[:3].tolist() == [1, 0, 1]
    assert confusion_matrix(truth, found, outcomes).tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_a_right_pair_is_preferred_to_a_confused_one() -> None:
    """The detection of the other category has the higher score; the annotation is still its own category's."""
    truth = ground_truth([[A]], [[1]])
    outcomes = find_outcomes(truth, detections([(10, 2, A, 0.9), (10, 1, A, 0.6)]), 0.5)
    assert [Outcome(value).name for value in outcomes.found] == ["FALSE", "MATCHED"]


def test_nothing_found_and_nothing_annotated() -> None:
    truth = ground_truth([[A], []], [[1], []])
    outcomes = find_outcomes(truth, detections([]), 0.5)
    assert outcomes.annotated.tolist() == [Outcome.MISSED]
    assert confusion_matrix(truth, detections([]), outcomes).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_annotations_that_are_not_numbers_are_left_alone() -> None:
    truth = ground_truth([[[float("nan"), 10.0, 40.0, 40.0], B]], [[1, 1]])
    outcomes = find_outcomes(truth, detections([(10, 1, A, 0.9)]), 0.5)
    assert [Outcome(value).name for value in outcomes.annotated] == ["IGNORED", "MISSED"]
    (image,) = images_of(truth, detections([(10, 1, A, 0.9)]))
    assert image.annotated.tolist() == [1] and image.iou.tolist() == [[0.0]]
