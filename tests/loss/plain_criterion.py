"""The set loss as the paper's text gives it: one layer, one image, one query at a time. The oracle of the tests.

Slow and simple on purpose; overlaps come from torchvision, the cheapest assignment from trying all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
import torchvision.ops as ops
from torch import Tensor

from detr_ray.structures import LayerOutput, ModelOutput, Target


def corners(boxes_cxcywh: Tensor) -> Tensor:
    return ops.box_convert(boxes_cxcywh, "cxcywh", "xyxy")


def pair_costs(logits: Tensor, boxes: Tensor, target: Target, weights: Sequence[float] = (1, 5, 2)) -> Tensor:
    """Costs [Q, N] of one image; weights of class, L1, GIoU."""
    probabilities = logits.softmax(-1)[:, target["labels"]]
    distance = torch.stack([(boxes - wanted).abs().sum(-1) for wanted in target["boxes"]], dim=1)
    overlap = ops.generalized_box_iou(corners(boxes), corners(target["boxes"]))
    return -weights[0] * probabilities + weights[1] * distance - weights[2] * overlap


def cheapest(costs: Tensor) -> list[tuple[int, int]]:
    """Cheapest assignment of [Q, N] costs as (query, box) pairs, by trying all."""
    num_queries, num_boxes = costs.shape
    if num_queries < num_boxes:
        return sorted((query, box) for box, query in cheapest(costs.T))
    rows: list[list[float]] = costs.double().tolist()
    tries = permutations(range(num_queries), num_boxes)
    best = min(tries, key=lambda chosen: sum(rows[query][box] for box, query in enumerate(chosen)))
    return sorted((query, box) for box, query in enumerate(best))


def layer_losses(layer: LayerOutput, targets: Sequence[Target], eos_coef: float) -> dict[str, Tensor]:
    """The five values of one layer, divided by its batch's own normalisers."""
    num_classes = layer["pred_logits"].shape[-1] - 1
    class_sum, weight_sum, distance, overlap = torch.zeros(4).unbind()
    cardinality, hits = [], []
    for logits, boxes, target in zip(layer["pred_logits"], layer["pred_boxes"], targets, strict=True):
        pairs = []
        if len(target["labels"]):
            pairs = cheapest(pair_costs(logits.detach(), boxes.detach(), target))
        classes = [num_classes] * len(logits)
        for query, box in pairs:
            classes[query] = int(target["labels"][box])
            distance = distance + (boxes[query] - target["boxes"][box]).abs().sum()
            giou = ops.generalized_box_iou(corners(boxes[query][None]), corners(target["boxes"][box][None]))
            overlap = overlap + 1 - giou.sum()
            hits.append(float(logits[query].argmax() == classes[query]))
        for query, label in enumerate(classes):
            weight = eos_coef if label == num_classes else 1.0
            class_sum = class_sum - weight * logits[query].log_softmax(-1)[label]
            weight_sum = weight_sum + weight
        says_object = sum(int(row.argmax() != num_classes) for row in logits)
        cardinality.append(abs(says_object - len(target["labels"])))
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    return {
        "loss_ce": class_sum / weight_sum,
        "loss_bbox": distance / num_boxes,
        "loss_giou": overlap / num_boxes,
        "class_error": torch.tensor(100 - 100 * sum(hits) / len(hits) if hits else 100.0),
        "cardinality_error": torch.tensor(sum(cardinality) / len(cardinality)),
    }


def plain_losses(outputs: ModelOutput, targets: Sequence[Target], eos_coef: float = 0.1) -> dict[str, Tensor]:
    """All values of a model's outputs under the original's keys."""
    losses = layer_losses(outputs, targets, eos_coef)
    for index, layer in enumerate(outputs.get("aux_outputs", [])):
        values = layer_losses(layer, targets, eos_coef)
        losses |= {f"{key}_{index}": value for key, value in values.items() if key != "class_error"}
    return losses


def plain_total(losses: dict[str, Tensor]) -> Tensor:
    """Weighted sum with the original's weights 1/5/2."""
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    return torch.stack([w * value for name, w in weights.items() for key, value in losses.items() if name in key]).sum()
