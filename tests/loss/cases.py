"""Random predictions and targets for the tests of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.structures import LayerOutput, ModelOutput, Target

NUM_CLASSES = 7


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """[*shape, 4] cxcywh boxes inside the unit square."""
    size = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
    centre = size / 2 + torch.rand(*shape, 2, generator=generator) * (1 - size)
    return torch.cat((centre, size), dim=-1)


def random_case(
    counts: Sequence[int], num_queries: int = 5, num_layers: int = 3, seed: int = 0
) -> tuple[ModelOutput, list[Target]]:
    """Leaf tensors of predictions of images with ``counts`` boxes, and those boxes."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        LayerOutput(
            pred_logits=torch.randn(len(counts), num_queries, NUM_CLASSES + 1, generator=generator).requires_grad_(),
            pred_boxes=random_boxes(len(counts), num_queries, generator=generator).requires_grad_(),
        )
        for _ in range(num_layers)
    ]
    targets = [
        Target(
            labels=torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            boxes=random_boxes(count, generator=generator),
        )
        for count in counts
    ]
    outputs = ModelOutput(**layers[-1])
    if num_layers > 1:
        outputs["aux_outputs"] = layers[:-1]
    return outputs, targets


def leaves(outputs: ModelOutput) -> list[Tensor]:
    """All prediction tensors, aux layers first."""
    return [layer[key] for layer in [*outputs.get("aux_outputs", []), outputs] for key in ("pred_logits", "pred_boxes")]


def loss_section(**changes: Any) -> SimpleNamespace:
    """The loss section's defaults, with ``changes``."""
    defaults = {"cost_class": 1, "cost_bbox": 5, "cost_giou": 2, "ce": 1, "bbox": 5, "giou": 2, "eos_coef": 0.1}
    assert not changes.keys() - defaults.keys()
    return SimpleNamespace(**(defaults | changes))


def criterion_for_case(**changes: Any) -> SetCriterion:
    return build_criterion(loss_section(**changes), num_classes=NUM_CLASSES, num_queries=5)
