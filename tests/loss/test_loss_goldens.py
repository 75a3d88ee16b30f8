from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import loss_section
from goldens import Golden, golden_config, golden_state_dict, load_golden

from detr_ray.loss import build_criterion
from detr_ray.model import build_model
from detr_ray.structures import ModelOutput, Target


@pytest.fixture(scope="module", params=["small", "r50"])
def golden(request: pytest.FixtureRequest, shared_data: Path) -> Golden:
    return load_golden(shared_data, request.param)


def assert_same_matches(found: list[tuple[torch.Tensor, torch.Tensor]], golden: Golden) -> None:
    for (queries, boxes), (golden_queries, golden_boxes) in zip(found, golden.matches, strict=True):
        assert queries.tolist() == golden_queries.tolist()
        assert boxes.tolist() == golden_boxes.tolist()


def test_the_original_predictions_give_the_original_matches_and_losses(golden: Golden) -> None:
    criterion = build_criterion(loss_section(), num_classes=golden.num_classes)
    outputs = ModelOutput(pred_logits=golden.pred_logits, pred_boxes=golden.pred_boxes)
    assert_same_matches(criterion.matcher(outputs, golden.targets), golden)
    losses = criterion(outputs, golden.targets)
    assert len(losses) == 5
    for key, value in losses.items():
        assert value.item() == pytest.approx(golden.losses[key], rel=1e-5), key


def test_model_and_criterion_give_the_original_losses_and_gradients(golden: Golden) -> None:
    model = build_model(golden_config(golden), num_classes=golden.num_classes)
    model.load_state_dict(golden_state_dict(model))
    model.train()
    criterion = build_criterion(loss_section(), num_classes=golden.num_classes)
    outputs = model(golden.images, golden.mask)
    assert_same_matches(criterion.matcher(outputs, golden.targets), golden)

    losses = criterion(outputs, golden.targets)
    assert losses.keys() == golden.losses.keys()
    for key, value in losses.items():
        assert value.item() == pytest.approx(golden.losses[key], rel=1e-4), key
    total = criterion.total(losses)
    assert total.item() == pytest.approx(golden.total, rel=1e-4)

    # Gradients in float64: rounding decides which units of a ReLU near zero are on, and it differs between processors.
    targets = [Target(labels=target["labels"], boxes=target["boxes"].double()) for target in golden.targets]
    criterion.total(criterion(model.double()(golden.images.double(), golden.mask), targets)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == golden.grad_norms.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        expected = golden.grad_norms[name]
        # The first decoder layer's values are all zero, so its attention's gradient is zero up to rounding.
        slack = 1e-4 if expected < 1e-5 else 0.0
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=slack), name
