# ruff: noqa: D102 - what forward() does is what its class says
"""The plain set loss: each decoder layer is matched and scored by itself, each image's costs solved on the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou


def corners(boxes: Tensor) -> Tensor:
    """Centre and size to corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


class PlainMatcher(nn.Module):
    """The Hungarian matcher with costs 1, 5 and 2."""

    @torch.no_grad()
    def forward(self, outputs: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        batch, queries = outputs["pred_logits"].shape[:2]
        probabilities = outputs["pred_logits"].flatten(0, 1).softmax(-1)
        boxes = outputs["pred_boxes"].flatten(0, 1)
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets])
        costs = (
            5 * torch.cdist(boxes, wanted, p=1)
            - probabilities[:, labels]
            - 2 * generalized_box_iou(corners(boxes), corners(wanted))
        )
        costs = costs.view(batch, queries, -1).cpu()
        counts = [len(target["boxes"]) for target in targets]
        found = [linear_sum_assignment(part[image]) for image, part in enumerate(costs.split(counts, -1))]
        return [(torch.as_tensor(i, dtype=torch.int64), torch.as_tensor(j, dtype=torch.int64)) for i, j in found]


class PlainCriterion(nn.Module):
    """Class, box and cardinality losses of each decoder layer, with weights 1, 5 and 2."""

    class_weight: Tensor

    def __init__(
        self, num_classes: int, eos_coef: float = 0.1, ce: float = 1, bbox: float = 5, giou: float = 2
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = PlainMatcher()
        self.loss_weights = {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = eos_coef
        self.register_buffer("class_weight", class_weight)

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
        losses = self._layer(outputs, targets, num_boxes, with_class_error=True)
        for number, layer in enumerate(outputs["aux_outputs"]):
            values = self._layer(layer, targets, num_boxes, with_class_error=False)
            losses.update({f"{name}_{number}": value for name, value in values.items()})
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum."""
        return sum(  # type: ignore[return-value] # there is a loss, so the sum is a tensor
            weight * value
            for name, weight in self.loss_weights.items()
            for key, value in losses.items()
            if key == name or key.startswith(f"{name}_")
        )

    def _layer(self, outputs: dict, targets: list[dict], num_boxes: int, with_class_error: bool) -> dict[str, Tensor]:
        matches = self.matcher(outputs, targets)
        images = torch.cat([torch.full_like(i, image) for image, (i, _) in enumerate(matches)])
        queries = torch.cat([i for i, _ in matches])
        labels = torch.cat([target["labels"][j] for target, (_, j) in zip(targets, matches, strict=True)])
        wanted = torch.cat([target["boxes"][j] for target, (_, j) in zip(targets, matches, strict=True)])

        logits = outputs["pred_logits"]
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[images, queries] = labels
        losses = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.class_weight)}
        if with_class_error:
            hits = (logits[images, queries].argmax(-1) == labels).float().mean() * 100 if len(labels) else 0.0
            losses["class_error"] = torch.as_tensor(100 - hits)
        counts = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
        predicted = (logits.argmax(-1) != self.num_classes).sum(1)
        losses["cardinality_error"] = F.l1_loss(predicted.float(), counts.float())

        boxes = outputs["pred_boxes"][images, queries]
        losses["loss_bbox"] = F.l1_loss(boxes, wanted, reduction="none").sum() / num_boxes
        overlap = torch.diag(generalized_box_iou(corners(boxes), corners(wanted)))
        losses["loss_giou"] = (1 - overlap).sum() / num_boxes
        return losses
