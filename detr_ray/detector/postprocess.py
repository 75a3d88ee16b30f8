"""Converts a model's output to boxes in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_ray.boxes import cxcywh_to_xyxy
from detr_ray.loss import ClassLoss
from detr_ray.structures import Detections, LayerOutput


def postprocess(
    outputs: LayerOutput, sizes: Tensor, class_loss: ClassLoss, max_detections: int = 100
) -> list[Detections]:
    """Scores, labels and pixel boxes, as the class loss reads the logits.

    DETR needs no suppression of duplicates.

    Args:
        outputs: the model's output, of any float precision.
        sizes: ``[B, 2]`` (height, width) in pixels of the images; boxes are given in these pixels.
        class_loss: the class loss of the model's training, which reads the logits.
        max_detections: largest number of detections an image, where a query may stand for several classes. With one
            class a query, all queries are given.

    Returns:
        One entry an image, on the outputs' device, scores and boxes in float32.
    """
    found = class_loss.scores(outputs["pred_logits"].float(), max_detections)
    boxes_cxcywh = outputs["pred_boxes"].float().take_along_dim(found.queries[..., None], dim=1)
    height, width = sizes.to(boxes_cxcywh).unbind(1)
    boxes_xyxy_px = cxcywh_to_xyxy(boxes_cxcywh) * torch.stack((width, height, width, height), dim=1)[:, None]
    return [
        Detections(scores=image_scores, labels=image_labels, boxes=image_boxes)
        for image_scores, image_labels, image_boxes in zip(found.scores, found.labels, boxes_xyxy_px, strict=True)
    ]
