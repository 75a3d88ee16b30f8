"""Deformable DETR against the numbers of the published code: outputs, losses, matches, gradients, detections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_goldens import (
    BOXES,
    GRADIENT,
    LOGITS,
    LOSS,
    SCORES,
    TOTAL,
    FamilyGolden,
    family_config,
    load_family_golden,
    load_family_weights,
)  # fmt: skip

from detr_ray.detector import postprocess
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.model import DetectionModel, build_model, published_state_dict
from detr_ray.structures import ModelOutput


class Case:
    """A model with the case's weights, its output in training mode, and its criterion."""

    def __init__(self, golden: FamilyGolden) -> None:
        self.golden = golden
        config = family_config(golden)
        self.model: DetectionModel = build_model(config.model, golden.settings["num_classes"])
        load_family_weights(self.model, golden)
        self.criterion: SetCriterion = build_criterion(config, golden.settings["num_classes"])
        self.output: ModelOutput = self.model.train()(golden.arrays["images"], golden.arrays["mask"])


@pytest.fixture(scope="module", params=["deformable_base", "deformable_two_stage"])
def case(request: pytest.FixtureRequest, shared_data: Path) -> Case:
    return Case(load_family_golden(shared_data, request.param))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_outputs_of_all_layers(case: Case) -> None:
    layers = {"": case.output} | {f"aux{number}/": layer for number, layer in enumerate(case.output["aux_outputs"])}
    for name, layer in layers.items():
        assert_close(layer["pred_boxes"], case.golden.arrays[f"{name}pred_boxes"], BOXES)
        assert_close(layer["pred_logits"], case.golden.arrays[f"{name}pred_logits"], LOGITS)
    if "enc/pred_boxes" in case.golden.arrays:
        cells = case.output["enc_outputs"]
        assert_close(cells["pred_boxes"], case.golden.arrays["enc/pred_boxes"], BOXES)
        assert_close(cells["pred_logits"][..., 0], case.golden.arrays["enc/logits_channel0"], LOGITS)
        assert_close(cells["pred_logits"].amax(-1), case.golden.arrays["enc/logits_max"], LOGITS)


def test_losses_matches_and_gradients(case: Case) -> None:
    golden = case.golden
    for image, (queries, targets) in enumerate(case.criterion.matcher(case.output, golden.targets)):
        assert torch.equal(queries, golden.arrays[f"match{image}/query"])
        assert torch.equal(targets, golden.arrays[f"match{image}/target"])
    losses = case.criterion(case.output, golden.targets)
    assert {name for name in losses if name.startswith("loss_")} == golden.losses.keys()
    for name, value in golden.losses.items():
        assert losses[name].item() == pytest.approx(value, rel=LOSS), name
    assert case.criterion.weights == golden.described["loss_weights"]
    total = case.criterion.total(losses)
    assert total.item() == pytest.approx(float(golden.arrays["total"]), rel=TOTAL)

    case.model.zero_grad()
    total.backward()
    found = {name: p.grad.norm().item() for name, p in case.model.named_parameters() if p.grad is not None}
    expected = golden.described["grad_norms"]
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(expected.values())
    for name, norm in expected.items():
        if norm > floor:
            assert found[name] == pytest.approx(norm, rel=GRADIENT), name


def test_detections_are_the_best_scores_over_queries_and_classes(case: Case) -> None:
    arrays = case.golden.arrays
    sizes = torch.tensor([[480, 640]]).expand(len(arrays["images"]), 2)
    for image, found in enumerate(postprocess(case.output, sizes, case.criterion.class_loss)):
        scores = arrays[f"post{image}/scores"]
        assert_close(found["scores"], scores, SCORES)
        gaps = (scores[:-1] - scores[1:]).abs() > SCORES
        clear = torch.cat((gaps, gaps.new_zeros(1))) & torch.cat((gaps.new_ones(1), gaps))
        assert clear.any()
        assert torch.equal(found["labels"][clear], arrays[f"post{image}/labels"][clear])
        assert_close(found["boxes"][clear], arrays[f"post{image}/boxes"][clear], BOXES * 640 * 2)


def test_the_published_names_are_given_back(case: Case) -> None:
    described = case.golden.described
    state = published_state_dict(case.model)
    assert {name: list(value.shape) for name, value in state.items()} == described["state_dict"]
    for twin, name in described["same_tensor"].items():
        assert torch.equal(state[twin], state[name])
