from __future__ import annotations

import pytest
import torch
from cases import criterion_for_case, leaves, random_case

from detr_ray.config import LossConfig, Schedule
from detr_ray.loss import build_criterion
from detr_ray.schedules import Curve


def test_plain_numbers_are_the_weights_of_every_layer_at_every_epoch() -> None:
    criterion = criterion_for_case(ce=1, bbox=5, giou=2)
    before = criterion.weights
    criterion.at_epoch(200.0)
    assert criterion.weights == before
    assert before["loss_ce"] == before["loss_ce_4"] == 1
    assert before["loss_bbox"] == before["loss_bbox_0"] == 5
    assert before["loss_giou"] == before["loss_giou_3"] == 2


def test_scheduled_weights_follow_the_epoch() -> None:
    criterion = criterion_for_case(
        giou=Schedule(points=((0.0, 0.0), (10.0, 4.0))), bbox=Curve(((0.0, 5.0), (2.0, 1.0)), "constant")
    )
    outputs, targets = random_case([3, 1], num_layers=2)
    losses = criterion(outputs, targets)
    totals = {}
    for epoch in (0.0, 2.5, 99.0):
        criterion.at_epoch(epoch)
        totals[epoch] = criterion.total(losses).item()
        if epoch == 2.5:
            assert criterion.weights == {
                "loss_ce": 1.0,
                "loss_bbox": 1.0,
                "loss_giou": 1.0,
                "loss_ce_0": 1.0,
                "loss_bbox_0": 1.0,
                "loss_giou_0": 1.0,
            }
    ce, bbox, giou = ((losses[name] + losses[f"{name}_0"]).item() for name in ("loss_ce", "loss_bbox", "loss_giou"))
    assert totals[0.0] == pytest.approx(ce + 5 * bbox, rel=1e-6)
    assert totals[2.5] == pytest.approx(ce + bbox + giou, rel=1e-6)
    assert totals[99.0] == pytest.approx(ce + bbox + 4 * giou, rel=1e-6)


def test_a_scheduled_no_object_weight_reaches_loss_and_normalisers() -> None:
    outputs, targets = random_case([2, 0])
    scheduled = criterion_for_case(eos_coef=Schedule(points=((0.0, 0.1), (1.0, 0.5))))
    scheduled.at_epoch(1.0)
    fixed = criterion_for_case(eos_coef=0.5)
    assert scheduled.normalisers([2, 0]) == fixed.normalisers([2, 0]) == (2.0, 2 + 0.5 * 8)
    assert torch.equal(scheduled(outputs, targets)["loss_ce"], fixed(outputs, targets)["loss_ce"])


def test_a_weight_of_zero_leaves_the_value_visible_and_takes_no_part_in_the_gradient() -> None:
    outputs, targets = random_case([3])
    criterion = criterion_for_case(bbox=0, giou=0)
    losses = criterion(outputs, targets)
    assert losses["loss_bbox"] > 0
    gradients = torch.autograd.grad(criterion.total(losses), leaves(outputs))
    assert all(gradient.any() for gradient in gradients[::2])
    assert not any(gradient.any() for gradient in gradients[1::2])


def test_the_config_section_is_taken_as_it_is() -> None:
    defaults = build_criterion(LossConfig())
    assert defaults.weights == criterion_for_case().weights
    assert (defaults.num_classes, defaults.class_loss.eos_coef) == (91, 0.1)
    assert (defaults.matcher.cost_class, defaults.matcher.cost_bbox, defaults.matcher.cost_giou) == (1, 5, 2)

    schedule = {"points": [[0, 1], [10, 2]], "interpolation": "linear"}
    scheduled = build_criterion(LossConfig.model_validate({"ce": schedule, "cost_bbox": schedule, "eos_coef": 0.2}))
    scheduled.at_epoch(5.0)
    assert scheduled.weights["loss_ce_0"] == pytest.approx(1.5)
    assert scheduled.matcher.cost_bbox == pytest.approx(1.5)
    assert scheduled.class_loss.eos_coef == 0.2
