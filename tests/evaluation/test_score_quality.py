"""What scores mean: best thresholds, precision and recall over scores, calibration."""

from __future__ import annotations

import json

import numpy as np
import pytest

from detr_ray.evaluation import DetectionTable, GroundTruth, describe_scores, evaluate_detections
from detr_ray.evaluation.score_quality import THRESHOLDS, Judged, calibration_error, measure_scores, scores_table

CATEGORIES = {3: "cat", 7: "dog", 9: "bird"}


def drawn(seed: int, count: int = 300) -> Judged:
    """Detections whose scores repeat, of two categories; there are more boxes than right detections."""
    random = np.random.default_rng(seed)
    scores = (random.integers(0, 40, count) / 40).astype(np.float32)
    categories, is_right = random.integers(0, 2, count), random.random(count) < scores * 0.7
    to_find = np.array([is_right[categories == place].sum() + 5 for place in range(2)] + [0])
    return Judged(scores, categories, is_right, to_find)


@pytest.mark.parametrize("seed", [0, 1])
def test_best_thresholds_and_curves_are_what_their_definition_gives(seed: int) -> None:
    judged = drawn(seed)
    measured = measure_scores(judged, CATEGORIES)
    for key, rows, boxes in [
        (None, np.full(len(judged.scores), True), judged.to_find.sum()),
        ("3", judged.categories == 0, judged.to_find[0]),
        ("7", judged.categories == 1, judged.to_find[1]),
    ]:
        found = measured["all"] if key is None else measured["categories"][key]

        def at(score: float, rows: np.ndarray = rows, boxes: int = boxes) -> tuple[float | None, float, float]:
            above = rows & (judged.scores >= np.float32(score))
            right, count = int(judged.is_right[above].sum()), int(above.sum())
            return right / count if count else None, right / boxes, 2 * right / (count + boxes)

        assert found["boxes"] == boxes
        best = max(np.unique(judged.scores[rows]).tolist(), key=lambda score: (at(score)[2], score))
        assert found["threshold"] == best
        assert (found["precision"], found["recall"], found["f1"]) == at(best)
        points = [at(threshold) for threshold in THRESHOLDS]
        for place, name in enumerate(("precision", "recall", "f1")):
            assert found["curves"][name] == [point[place] for point in points], name
    bird = measured["categories"]["9"]
    assert bird["name"] == "bird" and bird["boxes"] == 0 and bird["threshold"] is None and bird["curves"] is None
    json.dumps(measured, allow_nan=False)


def test_calibration_is_the_distance_of_scores_from_what_is_right() -> None:
    scores = np.array([0.95, 0.95, 0.95, 0.95, 0.25, 0.25, 0.01, 0.01])
    right = np.array([True, True, True, False, False, False, True, True])
    # 4 of 6 say 0.95 where 0.75 are right, 2 of 6 say 0.25 where none is; those below 0.05 do not count.
    assert calibration_error(scores, right) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.25)
    assert calibration_error(np.array([1.0]), np.array([True])) == 0
    assert calibration_error(scores[-2:], right[-2:]) is None


def test_what_is_right_is_decided_by_cocos_matching() -> None:
    """Two cats and a crowd of cats: found once, found twice, found badly, found within the crowd."""
    boxes = np.array([[0, 0, 10, 10], [20, 0, 10, 10], [50, 50, 40, 40]], float)
    truth = GroundTruth(
        image_ids=np.array([1, 2]),
        first_box=np.array([0, 3, 3]),
        boxes_xywh_px=boxes,
        category_ids=np.array([3, 3, 3]),
        areas=np.array([100.0, 100.0, 1600.0]),
        is_crowd=np.array([False, False, True]),
        annotation_ids=np.arange(3),
        categories=((3, "cat"), (7, "dog")),
    )
    rows = [
        (1, 3, [0, 0, 10, 10], 0.9), (1, 3, [0, 1, 10, 10], 0.8), (1, 3, [20, 0, 10, 11], 0.7),
        (1, 3, [60, 60, 9, 9], 0.95), (2, 3, [0, 0, 9, 9], 0.6), (2, 7, [0, 0, 9, 9], 0.99),
    ]  # fmt: skip
    images, categories, found, scores = (np.array(column) for column in zip(*rows, strict=True))
    table = DetectionTable(images, categories, found.astype(np.float32), scores.astype(np.float32))
    metrics = evaluate_detections(truth, table)
    cat = metrics.scores["categories"]["3"]
    assert cat["boxes"] == 2 and cat["threshold"] == np.float32(0.7)
    assert (cat["precision"], cat["recall"]) == (2 / 3, 1.0)
    everything = metrics.scores["all"]
    assert (everything["boxes"], everything["precision"]) == (2, 2 / 4), "the dog is wrong"
    assert "best F1 0.667 (precision 0.500, recall 1.000" in describe_scores(metrics.scores)
    assert scores_table(metrics.scores).splitlines()[1].split()[:4] == ["cat", "0.700", "0.667", "1.000"]
    nothing = evaluate_detections(truth, DetectionTable.empty())
    assert nothing.scores["all"]["threshold"] is None and nothing.scores["all"]["curves"]["recall"] == [0.0] * 21
    assert "no detection is right" in describe_scores(nothing.scores)
