"""Class losses with a sigmoid a class against their plain definitions, with one-hot targets."""

from __future__ import annotations

import pytest
import torch
from cases import random_boxes
from torch import Tensor

from benchmarks.baseline.focal_criterion import PlainFocalCriterion
from detr_ray.boxes import cxcywh_to_xyxy, iou
from detr_ray.config import LossConfig, load_config
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.loss.sigmoid_losses import FocalLoss
from detr_ray.structures import DenoisingOutput, LayerOutput, ModelOutput, Target

CLASSES, QUERIES = 4, 6
COUNTS = (3, 0, 2)
ALPHA = {"focal": 0.25, "vfl": 0.75}
KINDS = pytest.mark.parametrize("kind", ["focal", "vfl", "mal"])


def drawn() -> tuple[ModelOutput, list[Target]]:
    generator = torch.Generator().manual_seed(0)
    output = ModelOutput(
        pred_logits=(2 * torch.randn(3, QUERIES, CLASSES, generator=generator)).requires_grad_(),
        pred_boxes=random_boxes(3, QUERIES, generator=generator),
    )
    targets = [
        Target(
            labels=torch.randint(CLASSES, (count,), generator=generator),
            boxes=random_boxes(count, generator=generator),
        )
        for count in COUNTS
    ]
    return output, targets


def criterion_of(kind: str, **changes: float) -> SetCriterion:
    return build_criterion(LossConfig(class_loss=kind, **changes), CLASSES)


def plain(kind: str, logits: Tensor, one_hot: Tensor, quality: Tensor) -> Tensor:
    """The definitions, query by query and class by class; ``quality`` is the IoU of each matched query."""
    p = logits.sigmoid()
    if kind == "focal":
        p_right = torch.where(one_hot > 0, p, 1 - p)
        weight = torch.where(one_hot > 0, 0.25, 0.75)
        return (-weight * (1 - p_right) ** 2 * p_right.log()).sum()
    gamma = 2.0 if kind == "vfl" else 1.5
    wanted = one_hot * (quality if kind == "vfl" else quality**gamma)[..., None]
    weight = (0.75 if kind == "vfl" else 1.0) * p.detach() ** gamma
    weight = torch.where(one_hot > 0, quality[..., None] if kind == "vfl" else 1.0, weight)
    return -(weight * (wanted * p.log() + (1 - wanted) * (1 - p).log())).sum()


@KINDS
def test_values_and_gradients_are_those_of_the_definition(kind: str) -> None:
    output, targets = drawn()
    measure = criterion_of(kind)
    one_hot, quality = torch.zeros(3, QUERIES, CLASSES), torch.zeros(3, QUERIES)
    for image, (queries, boxes) in enumerate(measure.matcher(output, targets)):
        one_hot[image, queries, targets[image]["labels"][boxes]] = 1
        found, wanted = output["pred_boxes"][image, queries], targets[image]["boxes"][boxes]
        quality[image, queries] = iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    expected = plain(kind, output["pred_logits"], one_hot, quality) / sum(COUNTS)
    loss = measure(output, targets)["loss_ce"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, output["pred_logits"]), torch.autograd.grad(expected, output["pred_logits"])
    )


@KINDS
def test_the_cost_of_a_label_is_its_focal_loss_as_one_less_that_as_zero(kind: str) -> None:
    output, _ = drawn()
    images, labels = torch.tensor([0, 2]), torch.tensor([1, 3])
    loss = criterion_of(kind).class_loss
    logits = output["pred_logits"].detach()[None]
    p = logits[0][images, :, labels].sigmoid()
    expected = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    torch.testing.assert_close(loss.costs(loss.activate(logits), images, labels)[:, 0], expected)


def test_alpha_and_gamma_are_the_configured_ones() -> None:
    output, targets = drawn()
    values = [
        criterion_of("focal", **changes)(output, targets)["loss_ce"].item()
        for changes in ({}, {"focal_alpha": 0.5}, {"focal_gamma": 1.0})
    ]
    assert len({round(value, 4) for value in values}) == 3


@KINDS
def test_images_without_boxes_are_divided_by_one(kind: str) -> None:
    output, _ = drawn()
    empty = [Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))] * 3
    measure = criterion_of(kind)
    losses = measure(output, empty)
    none = torch.zeros(3, QUERIES, CLASSES)
    torch.testing.assert_close(losses["loss_ce"], plain(kind, output["pred_logits"], none, none[..., 0]))
    assert measure.normalisers([0, 0, 0]) == (0.0, 0.0) and measure.normalisers([2, 1]) == (3.0, 3.0)


def test_scores_are_the_best_over_queries_and_classes() -> None:
    logits = torch.tensor([[[3.0, -1.0], [2.0, 2.5], [-4.0, 0.0]]])
    found = FocalLoss(2).scores(logits, limit=4)
    assert found.queries.tolist() == [[0, 1, 1, 2]] and found.labels.tolist() == [[0, 1, 0, 1]]
    torch.testing.assert_close(found.scores, torch.tensor([[3.0, 2.5, 2.0, 0.0]]).sigmoid())
    assert FocalLoss(2).scores(logits, limit=100).scores.shape == (1, 6)


def test_errors_speak_of_sigmoid_outputs() -> None:
    """An object is found from a probability of one half; the class is the most probable one."""
    output = ModelOutput(
        pred_logits=torch.tensor([[[3.0, -3.0, -3.0, -3.0], [-3.0, 1.0, -3.0, -3.0], [-1.0, -2.0, -3.0, -3.0]]]),
        pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]]),
    )
    wanted = [Target(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    losses = criterion_of("focal")(output, wanted)
    assert (losses["cardinality_error"].item(), losses["class_error"].item()) == (1.0, 0.0)


def drawn_layer(queries: int, seed: int) -> LayerOutput:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(COUNTS), queries, CLASSES, generator=generator)
    return LayerOutput(pred_logits=logits, pred_boxes=random_boxes(len(COUNTS), queries, generator=generator))


@pytest.mark.parametrize("architecture", ["deformable_detr", "dino"])
def test_a_plain_criterion_layer_by_layer_gives_the_same(architecture: str) -> None:
    """The one that the benchmark of a step compares with; of DINO with two groups of three boxes."""
    output, targets = drawn()
    first, _ = drawn()
    layers = ModelOutput(**output, aux_outputs=[LayerOutput(**first)])
    overrides = [f"model.architecture={architecture}"]
    if architecture == "dino":
        layers["interm_outputs"] = drawn_layer(QUERIES, 5)
        layers["dn_outputs"] = DenoisingOutput(**drawn_layer(12, 6), aux_outputs=[drawn_layer(12, 7)], groups=2)
    else:
        layers["enc_outputs"] = drawn_layer(9, 5)
        overrides.append("model.two_stage=true")
    config = load_config(None, overrides)
    ours, plain = build_criterion(config, CLASSES), PlainFocalCriterion(config.loss.ce)
    found, expected = ours(layers, targets), plain(layers, targets)
    assert {name for name in found if name.startswith("loss")} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(ours.total(found), plain.total(expected))
