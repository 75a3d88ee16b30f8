"""The modules that are traced: a detector's forward pass for padded batches, or for a single image.

Knows tensors; knows nothing of file formats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_ray.detector import postprocess
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.structures import LayerOutput


class BatchGraph(nn.Module):
    """A model whose inputs and outputs are tensors alone.

    Args:
        model: as `exportable` gave it.
    """

    def __init__(self, model: DetectionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` normalised, mask ``[B, H, W]`` True on padding -> logits, boxes_cxcywh in 0..1."""
        output = self.model(images, mask)
        return output["pred_logits"], output["pred_boxes"]


class ImageGraph(nn.Module):
    """A detector for one image that has already been resized.

    Args:
        model: as `exportable` gave it.
        class_loss: says what the logits mean.
        max_detections: as `postprocess` takes it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: DetectionModel, class_loss: ClassLoss, max_detections: int) -> None:
        super().__init__()
        self.model = model
        self.class_loss = class_loss
        self.max_detections = max_detections
        for name, values in zip(("mean", "std"), model.pixels, strict=True):
            self.register_buffer(name, torch.tensor(values).mul(255).view(1, 3, 1, 1))

    def forward(self, resized: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detects on an image.

        Args:
            resized: ``[1, 3, H, W]`` uint8 RGB, at the model's input size.
            size: ``[2]`` int64, height and width in pixels of the image; boxes are given in these pixels.

        Returns:
            boxes_xyxy_px ``[K, 4]``, scores ``[K]`` and labels ``[K]``, the best first.
        """
        output = self.model((resized.to(torch.float32) - self.mean) / self.std)
        last = LayerOutput(pred_logits=output["pred_logits"], pred_boxes=output["pred_boxes"])
        (found,) = postprocess(last, size[None], self.class_loss, self.max_detections)
        scores, order = found["scores"].sort(descending=True)
        return found["boxes"][order], scores, found["labels"][order]
