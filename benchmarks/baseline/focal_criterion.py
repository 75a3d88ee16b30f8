# ruff: noqa: D102 - what forward() does is what its class says
"""The plain set loss of Deformable DETR and DINO: layer by layer, costs of all queries with the boxes of all images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

from benchmarks.baseline.criterion import corners

ALPHA, GAMMA = 0.25, 2.0


class PlainFocalMatcher(nn.Module):
    """The Hungarian matcher with costs 2, 5 and 2, and focal class costs."""

    @torch.no_grad()
    def forward(self, outputs: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        batch, queries = outputs["pred_logits"].shape[:2]
        probability = outputs["pred_logits"].flatten(0, 1).sigmoid()
        boxes = outputs["pred_boxes"].flatten(0, 1)
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets])
        as_zero = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
        as_one = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
        costs = (
            5 * torch.cdist(boxes, wanted, p=1)
            + 2 * (as_one[:, labels] - as_zero[:, labels])
            - 2 * generalized_box_iou(corners(boxes), corners(wanted))
        )
        costs = costs.view(batch, queries, -1).cpu()
        counts = [len(target["boxes"]) for target in targets]
        found = [linear_sum_assignment(part[image]) for image, part in enumerate(costs.split(counts, -1))]
        return [(torch.as_tensor(i, dtype=torch.int64), torch.as_tensor(j, dtype=torch.int64)) for i, j in found]


class PlainFocalCriterion(nn.Module):
    """Focal class loss and box losses of each decoder layer, of the encoder's cells and of denoising queries, with
    weights 5 and 2 for boxes.
    """

    def __init__(self, class_weight: float) -> None:
        super().__init__()
        self.matcher = PlainFocalMatcher()
        self.weights = {"loss_ce": class_weight, "loss_bbox": 5.0, "loss_giou": 2.0}

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        losses = self._layer(outputs, targets)
        for number, layer in enumerate(outputs["aux_outputs"]):
            losses.update({f"{name}_{number}": value for name, value in self._layer(layer, targets).items()})
        if "enc_outputs" in outputs:
            objects = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            of_encoder = self._layer(outputs["enc_outputs"], objects)
            losses.update({f"{name}_enc": value for name, value in of_encoder.items()})
        if "interm_outputs" in outputs:
            chosen = self._layer(outputs["interm_outputs"], targets)
            losses.update({f"{name}_interm": value for name, value in chosen.items()})
        if "dn_outputs" in outputs:
            losses.update(self._denoising(outputs["dn_outputs"], targets))
        return losses

    def _denoising(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        groups = outputs["groups"]
        size = outputs["pred_logits"].shape[1] // groups
        pairs = []
        for target in targets:
            boxes = torch.arange(len(target["labels"]))
            starts = torch.arange(groups)[:, None] * size
            pairs.append(((starts + boxes).flatten(), boxes.repeat(groups)))
        losses = {}
        layers = {f"_dn_{number}": layer for number, layer in enumerate(outputs["aux_outputs"])}
        for suffix, layer in (layers | {"_dn": outputs}).items():
            found = self._layer(layer, targets, pairs, groups)
            losses.update({name + suffix: value for name, value in found.items()})
        return losses

    def _layer(
        self, outputs: dict, targets: list[dict], pairs: list | None = None, repeats: int = 1
    ) -> dict[str, Tensor]:
        num_boxes = max(sum(len(target["labels"]) for target in targets), 1) * repeats
        pairs = pairs or self.matcher(outputs, targets)
        logits = outputs["pred_logits"].float()
        wanted = torch.zeros_like(logits)
        for image, (queries, boxes) in enumerate(pairs):
            wanted[image, queries, targets[image]["labels"][boxes]] = 1
        probability = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        right = probability * wanted + (1 - probability) * (1 - wanted)
        focal = (ALPHA * wanted + (1 - ALPHA) * (1 - wanted)) * entropy * (1 - right) ** GAMMA
        found = torch.cat([outputs["pred_boxes"][image, queries] for image, (queries, _) in enumerate(pairs)])
        boxes = torch.cat([targets[image]["boxes"][chosen] for image, (_, chosen) in enumerate(pairs)])
        giou = torch.diag(generalized_box_iou(corners(found), corners(boxes)))
        return {
            "loss_ce": focal.mean(1).sum() / num_boxes * logits.shape[1],
            "loss_bbox": F.l1_loss(found, boxes, reduction="none").sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of all layers' losses."""
        kinds = {name: next(kind for kind in self.weights if name.startswith(kind)) for name in losses}
        return torch.stack([self.weights[kinds[name]] * value for name, value in losses.items()]).sum()
