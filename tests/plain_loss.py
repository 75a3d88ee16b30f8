"""The set loss of a batch in a few lines of plain torch and scipy, with weights and normalisers to choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision.ops as ops
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_ray.structures import LayerOutput, ModelOutput, Target


def _corners(boxes_cxcywh: Tensor) -> Tensor:
    return ops.box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def layer_losses(
    layer: LayerOutput,
    targets: Sequence[Target],
    eos_coef: float,
    costs: tuple[float, float, float],
    normalisers: tuple[float, float] | None,
) -> dict[str, Tensor]:
    """``loss_ce``, ``loss_bbox`` and ``loss_giou`` of one layer."""
    num_classes = layer["pred_logits"].shape[-1] - 1
    weights = torch.ones(num_classes + 1)
    weights[-1] = eos_coef
    class_sum = distance = overlap = torch.zeros(())
    weight_sum, num_boxes = 0.0, 0
    for logits, boxes, target in zip(layer["pred_logits"], layer["pred_boxes"], targets, strict=True):
        pair_costs = (
            -costs[0] * logits.softmax(-1)[:, target["labels"]]
            + costs[1] * torch.cdist(boxes, target["boxes"], p=1)
            - costs[2] * ops.generalized_box_iou(_corners(boxes), _corners(target["boxes"]))
        )
        queries, found = linear_sum_assignment(pair_costs.detach().numpy())
        classes = torch.full((len(logits),), num_classes)
        classes[queries] = target["labels"][found]
        class_sum = class_sum + F.cross_entropy(logits, classes, weights, reduction="sum")
        weight_sum += float(weights[classes].sum())
        matched, wanted = boxes[queries], target["boxes"][found]
        distance = distance + (matched - wanted).abs().sum()
        overlap = overlap + (1 - ops.generalized_box_iou(_corners(matched), _corners(wanted)).diagonal()).sum()
        num_boxes += len(target["labels"])
    class_norm, box_norm = normalisers or (weight_sum, max(num_boxes, 1))
    return {"loss_ce": class_sum / class_norm, "loss_bbox": distance / box_norm, "loss_giou": overlap / box_norm}


def plain_losses(
    outputs: ModelOutput,
    targets: Sequence[Target],
    eos_coef: float,
    costs: tuple[float, float, float],
    normalisers: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """The losses of all layers under the original's names; normalisers are (class weights, boxes)."""
    losses = layer_losses(outputs, targets, eos_coef, costs, normalisers)
    for number, layer in enumerate(outputs.get("aux_outputs", [])):
        found = layer_losses(layer, targets, eos_coef, costs, normalisers)
        losses |= {f"{name}_{number}": value for name, value in found.items()}
    return losses
