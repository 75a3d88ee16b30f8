"""Drawn cases in which matching is hard: ties everywhere, crowds, edges of the areas, too many detections."""

from __future__ import annotations

import numpy as np
import pytest
from plain_coco import as_coco, assert_equal_to_the_last_bit, plain_pycocotools

from detr_ray.evaluation import (
    DetectionTable,
    GroundTruth,
    ScorerProcess,
    ScoringFailed,
    evaluate_detections,
    matching,
)

CATEGORIES = tuple((category_id, f"kind {category_id}") for category_id in (1, 2, 3, 5, 8, 90))
NEVER_ANNOTATED = 90
NOT_SCORED = 7
SIDES = np.array([0.0, 8.0, 16.0, 32.0, 48.0, 96.0, 128.0])  # areas of exactly 32 x 32 and 96 x 96 among them


def draw_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """On a coarse grid, so that many overlaps are equal, and many are exactly a threshold."""
    corners = rng.integers(0, 12, (count, 2)) * 8.0
    return np.concatenate([corners, rng.choice(SIDES, (count, 2), p=[0.02, 0.2, 0.2, 0.2, 0.15, 0.15, 0.08])], axis=1)


def draw_case(seed: int, num_images: int = 40, per_image: int = 30) -> tuple[GroundTruth, DetectionTable]:
    """Images with up to a dozen boxes and three times as many detections, most of them near a box."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 4, 12], num_images)
    total = int(counts.sum())
    boxes = draw_boxes(rng, total)
    image_ids = rng.permutation(1000)[:num_images].astype(np.int64)
    truth = GroundTruth(
        image_ids=image_ids,
        first_box=np.cumsum([0, *counts]),
        boxes_xywh_px=boxes,
        category_ids=rng.choice([1, 1, 1, 2, 3, 5, 8, NOT_SCORED], total),
        areas=np.where(rng.random(total) < 0.5, boxes[:, 2] * boxes[:, 3], rng.choice([1024.0, 9216.0, 500.0], total)),
        is_crowd=rng.random(total) < 0.15,
        annotation_ids=np.arange(total),
        categories=CATEGORIES,
    )
    image_of_box = truth.image_of_box()
    near = rng.integers(0, total, num_images * per_image)
    shifts = rng.choice([0.0, 0.0, 0.0, 1.0, -2.0, 4.0], (len(near), 4))
    stray = rng.random(len(near)) < 0.3
    found = DetectionTable(
        image_ids=np.where(stray, rng.choice(image_ids, len(near)), image_of_box[near]),
        category_ids=np.where(
            stray, rng.choice([1, 2, 8, NEVER_ANNOTATED, NOT_SCORED], len(near)), truth.category_ids[near]
        ),
        boxes_xywh_px=np.where(stray[:, None], draw_boxes(rng, len(near)), boxes[near] + shifts).astype(np.float32),
        scores=(rng.integers(1, 9, len(near)) / 8).astype(np.float32),
    )
    return truth, found


@pytest.mark.parametrize("seed", range(12))
def test_equals_pycocotools_to_the_last_bit(seed: int) -> None:
    truth, found = draw_case(seed)
    metrics = evaluate_detections(truth, found)
    assert_equal_to_the_last_bit(metrics, plain_pycocotools(as_coco(truth), found.sorted()), truth)
    assert metrics.ap is not None and metrics.ap > 0.05 and metrics.category_ap["kind 90"] is None


def test_more_than_a_hundred_detections_of_an_image_and_category_are_cut_likewise() -> None:
    truth, found = draw_case(seed=100, num_images=6, per_image=400)
    one_kind = DetectionTable(found.image_ids, np.ones_like(found.category_ids), found.boxes_xywh_px, found.scores)
    assert np.bincount(found.image_ids).max() > 200
    plain = plain_pycocotools(as_coco(truth), one_kind.sorted())
    assert_equal_to_the_last_bit(evaluate_detections(truth, one_kind), plain, truth)


@pytest.mark.parametrize(("order", "recall"), [([0, 1], 1.0), ([1, 0], 0.5)])
def test_of_two_equal_overlaps_the_later_box_is_taken(order: list[int], recall: float) -> None:
    boxes = np.array([[5.0, 0.0, 20.0, 10.0], [15.0, 0.0, 20.0, 10.0]])[order]  # the first detection is between them
    truth = GroundTruth(
        image_ids=np.array([7]),
        first_box=np.array([0, 2]),
        boxes_xywh_px=boxes,
        category_ids=np.array([1, 1]),
        areas=np.array([200.0, 200.0]),
        is_crowd=np.zeros(2, bool),
        annotation_ids=np.array([1, 2]),
        categories=((1, "kind 1"),),
    )
    found = DetectionTable(
        image_ids=np.array([7, 7]),
        category_ids=np.array([1, 1]),
        boxes_xywh_px=np.array([[10.0, 0.0, 20.0, 10.0], [0.0, 0.0, 20.0, 10.0]], np.float32),
        scores=np.array([0.9, 0.8], np.float32),
    )
    plain = plain_pycocotools(as_coco(truth), found)
    assert_equal_to_the_last_bit(evaluate_detections(truth, found), plain, truth)
    assert plain.eval["recall"][0, 0, 0, 2] == recall


def test_only_crowds() -> None:
    truth, found = draw_case(seed=102)
    columns = {name: getattr(truth, name) for name in truth.__slots__}
    crowds = GroundTruth(**columns | {"is_crowd": np.ones(len(truth.is_crowd), bool)})
    metrics = evaluate_detections(crowds, found)
    assert_equal_to_the_last_bit(metrics, plain_pycocotools(as_coco(crowds), found.sorted()), crowds)
    assert metrics.ap is None


def test_no_detection_at_all() -> None:
    truth, _ = draw_case(seed=103)
    metrics = evaluate_detections(truth, DetectionTable.empty())
    assert_equal_to_the_last_bit(metrics, plain_pycocotools(as_coco(truth), DetectionTable.empty()), truth)
    assert metrics.ap == 0


def test_overlaps_computed_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = draw_case(seed=104)
    at_once = evaluate_detections(truth, found)
    monkeypatch.setattr(matching, "MOST_PAIRS", 3)
    assert evaluate_detections(truth, found) == at_once


def test_another_process_gives_the_same_numbers(caplog: pytest.LogCaptureFixture) -> None:
    truth, found = draw_case(seed=105)
    truth.boxes_xywh_px[3, 0] = np.nan
    assert ScorerProcess(truth, found).result(limit_s=60) == evaluate_detections(truth, found)
    assert len(caplog.messages) == 2 and len(set(caplog.messages)) == 1, "its warnings come along"


def test_another_process_that_fails_says_why() -> None:
    truth, found = draw_case(seed=106)
    found.scores[5] = np.nan
    with pytest.raises(ScoringFailed, match=r"ValueError: 1 detections are not finite numbers, e\.g\. in image id"):
        ScorerProcess(truth, found).result(limit_s=60)


def test_another_process_is_ended_in_time() -> None:
    truth, found = draw_case(seed=107)
    with pytest.raises(ScoringFailed, match="more than"):
        ScorerProcess(truth, found).result(limit_s=0.01)
