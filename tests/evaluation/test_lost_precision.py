"""The loss of AP of each image, against AP computed in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from test_coco_metrics import detections, ground_truth, noisy_detections
from test_outcomes import random_truth

from detr_ray.evaluation import evaluate_detections
from detr_ray.evaluation.lost_precision import lost_precision
from detr_ray.evaluation.matched import match_all

A, B, FAR = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 60.0, 60.0], [300.0, 20.0, 30.0, 30.0]


def test_what_each_image_costs_by_hand() -> None:
    """The first is missed and has a false detection before the second is found."""
    truth = ground_truth([[A], [B], []], [[1], [1], []])
    found = detections([(10, 1, FAR, 0.9), (11, 1, B, 0.5), (12, 1, FAR, 0.2)])
    lost = lost_precision(truth, found)
    assert lost.by_annotation.tolist() == pytest.approx([0.5, 0])
    assert lost.by_detection.tolist() == pytest.approx([0.25, 0, 0]), "half of the precision of half of the boxes"
    assert lost.by_image(truth, found).tolist() == pytest.approx([0.75, 0, 0])
    assert lost.average_precision == pytest.approx(0.25)


def plain_average_precision(seed: int) -> tuple[float, float]:
    """AP without interpolation in loops over the matched detections; and what `lost_precision` says."""
    truth = random_truth(seed)
    found = noisy_detections(truth, seed)
    averages = []
    for category in match_all(truth, found):
        if not category.to_find:
            continue
        for threshold in range(10):
            right = count = 0
            precisions = []
            for place in range(len(category.found)):
                if category.is_neutral[threshold, place]:
                    continue
                count += 1
                if category.is_right[threshold, place]:
                    right += 1
                    precisions.append(right / count)
            averages.append(sum(precisions) / category.to_find)
    lost = lost_precision(truth, found)
    by_image = lost.by_image(truth, found)
    assert by_image.sum() == pytest.approx(1 - lost.average_precision) and by_image.min() >= 0
    assert abs(lost.average_precision - (evaluate_detections(truth, found).summary["AP"] or 0)) < 0.05
    return float(np.mean(averages)), lost.average_precision


@pytest.mark.parametrize("seed", range(4))
def test_all_images_together_cost_what_is_missing_to_one(seed: int) -> None:
    plain, ours = plain_average_precision(seed)
    assert ours == pytest.approx(plain)


def test_images_in_any_order() -> None:
    truth = ground_truth([[A], [B]], [[1], [1]])
    turned = ground_truth([[B], [A]], [[1], [1]])
    object.__setattr__(turned, "image_ids", np.array([11, 10]))
    found = detections([(11, 1, B, 0.9)])
    assert lost_precision(truth, found).by_image(truth, found).tolist() == pytest.approx([0.5, 0])
    assert lost_precision(turned, found).by_image(turned, found).tolist() == pytest.approx([0, 0.5])
