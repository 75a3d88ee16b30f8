"""Kinds of errors in hand-made cases with one error each; and what they cost adds up."""

from __future__ import annotations

import pytest
from test_coco_metrics import detections, ground_truth, noisy_detections
from test_outcomes import random_truth

from detr_ray.evaluation import evaluate_detections
from detr_ray.evaluation.error_breakdown import KINDS, break_down_errors

A, B, FAR = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 60.0, 60.0], [300.0, 20.0, 30.0, 30.0]
SHIFTED = [30.0, 10.0, 40.0, 40.0]  # IoU 1/3 with A
CASES = {
    "classification": [(10, 2, A, 0.9)],
    "localisation": [(10, 1, SHIFTED, 0.9)],
    "both": [(10, 2, SHIFTED, 0.9)],
    "duplicate": [(10, 1, A, 0.95), (10, 1, A, 0.9)],
    "background": [(10, 1, FAR, 0.9)],
    "missed": [],
}
"""What is found of A, a cat; B, a dog, is always found, with the lowest score."""


@pytest.mark.parametrize("kind", KINDS)
def test_one_error_of_each_kind(kind: str) -> None:
    truth = ground_truth([[A, B]], [[1, 2]])
    errors = break_down_errors(truth, detections([*CASES[kind], (10, 2, B, 0.5)]))
    missed = int(kind in ("both", "background", "missed"))  # nothing points at A in these cases
    assert errors.counts == dict.fromkeys(KINDS, 0) | {"missed": missed} | {kind: 1}
    assert errors.ap50 + sum(errors.in_turn.values()) == pytest.approx(1.0)
    costing = {name for name, cost in errors.in_turn.items() if cost > 1e-9}
    expected = {
        "classification": {"classification"},
        "localisation": {"localisation"},
        "both": {"both", "missed"},
        "duplicate": set(),  # it comes after the last annotation is found, and costs nothing
        "background": {"missed"},
        "missed": {"missed"},
    }[kind]
    assert costing == expected
    assert errors.alone["missed"] == pytest.approx(0.0 if not missed or kind == "background" else 0.5)


def test_duplicates_and_false_ones_cost_what_comes_after_them() -> None:
    truth = ground_truth([[A, B]], [[1, 1]])
    for wrong, kind in (((10, 1, A, 0.8), "duplicate"), ((10, 1, FAR, 0.8), "background")):
        errors = break_down_errors(truth, detections([(10, 1, A, 0.9), wrong, (10, 1, B, 0.7)]))
        cost = 50 / 101 * (1 - 2 / 3)  # the precision at the 50 recalls above one half
        assert errors.in_turn == pytest.approx(dict.fromkeys(KINDS, 0.0) | {kind: cost})
        assert errors.alone == pytest.approx(errors.in_turn)


def test_mending_a_label_makes_the_detection_right_where_nothing_else_is() -> None:
    truth = ground_truth([[A, B]], [[1, 2]])
    mended = break_down_errors(truth, detections([(10, 2, A, 0.9), (10, 2, B, 0.5)]))
    assert (mended.ap50, mended.alone["classification"]) == (pytest.approx(0.25), pytest.approx(0.75))
    found_already = break_down_errors(truth, detections([(10, 2, A, 0.9), (10, 1, A, 0.8), (10, 2, B, 0.5)]))
    assert (found_already.ap50, found_already.alone["classification"]) == (pytest.approx(0.75), pytest.approx(0.25))


def test_any_detections_add_up_to_one_from_cocos_ap50() -> None:
    for seed in range(8):
        truth = random_truth(seed)
        found = noisy_detections(truth, seed)
        errors = break_down_errors(truth, found)
        assert errors.ap50 == pytest.approx(evaluate_detections(truth, found).summary["AP50"], abs=1e-12)
        assert errors.ap50 + sum(errors.in_turn.values()) == pytest.approx(1.0)
        assert min(errors.in_turn.values()) > -1e-12 and min(errors.alone.values()) > -1e-12


def test_crowds_and_categories_without_annotations_are_no_errors() -> None:
    truth = ground_truth([[A, B]], [[1, 1]], [[False, True]])
    errors = break_down_errors(truth, detections([(10, 1, A, 0.9), (10, 1, [205, 205, 20, 20], 0.95), (10, 2, A, 0.9)]))
    assert errors.ap50 == pytest.approx(1.0) and set(errors.counts.values()) == {0}


def test_a_duplicate_may_fit_worse_than_the_one_that_is_right() -> None:
    truth = ground_truth([[A, B]], [[1, 2]])
    near = [15.0, 10.0, 40.0, 40.0]  # IoU 7/9 with A
    errors = break_down_errors(truth, detections([(10, 1, A, 0.95), (10, 1, near, 0.9), (10, 2, B, 0.5)]))
    assert errors.counts == dict.fromkeys(KINDS, 0) | {"duplicate": 1}
