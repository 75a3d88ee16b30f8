"""Matching and losses on a device against those of the CPU, for the same predictions."""

from __future__ import annotations

import pytest
import torch
from drawn import CLASSES, deviation, draw_batch, settings
from torch import Tensor

from detr_ray.loss import NonFiniteOutputs, build_criterion
from detr_ray.structures import IMAGENET_PIXELS, ModelOutput, Target, to_device

LAYERS, QUERIES = 3, 20


def predictions(device: torch.device) -> tuple[ModelOutput, list[Tensor], list[Target]]:
    """Random logits and boxes of three layers, as leaves of a graph, and the targets of a batch."""
    generator = torch.Generator().manual_seed(5)
    batch = to_device(draw_batch(), device, IMAGENET_PIXELS)
    images = len(batch.targets)
    leaves = []
    for _ in range(LAYERS):
        leaves.append(torch.randn(images, QUERIES, CLASSES + 1, generator=generator))
        leaves.append(torch.rand(images, QUERIES, 4, generator=generator) * 0.4 + 0.3)
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    layers = [{"pred_logits": leaves[2 * i], "pred_boxes": leaves[2 * i + 1]} for i in range(LAYERS)]
    return {**layers[-1], "aux_outputs": layers[:-1]}, leaves, batch.targets


def test_losses_matchings_and_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    losses, matchings, gradients = [], [], []
    for place in (torch.device("cpu"), device):
        criterion = build_criterion(settings().loss, CLASSES, LAYERS).to(place)
        outputs, leaves, targets = predictions(place)
        found = criterion(outputs, targets, (7.0, 11.0))
        criterion.total(found).backward()
        losses.append(found)
        matchings.append(criterion.matcher(outputs, targets))
        gradients.append({str(number): leaf.grad for number, leaf in enumerate(leaves)})
    assert all(value.device.type == device.type for value in losses[1].values())
    assert losses[1].keys() == losses[0].keys()
    for name, value in losses[0].items():
        assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert deviation(gradients[1], gradients[0]) < 1e-5
    for mine, theirs in zip(matchings[1], matchings[0], strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_predictions_that_are_not_finite_are_found(device: torch.device) -> None:
    criterion = build_criterion(settings().loss, CLASSES, LAYERS).to(device)
    outputs, _, targets = predictions(device)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_boxes"][2, 3, 1] = torch.nan
    with pytest.raises(NonFiniteOutputs) as found:
        criterion(outputs, targets)
    assert list(found.value.image_indices) == [2]


def test_labels_out_of_range_are_an_error_and_no_fault_of_the_device(device: torch.device) -> None:
    criterion = build_criterion(settings().loss, CLASSES, LAYERS).to(device)
    outputs, _, targets = predictions(device)
    targets[1]["labels"][0] = CLASSES
    with pytest.raises(ValueError, match=f"label {CLASSES} of image 1 of the micro-batch is outside"):
        criterion(outputs, targets)
    targets[1]["labels"][0] = 0
    assert torch.isfinite(criterion.total(criterion(outputs, targets))).item(), "the device works on"
