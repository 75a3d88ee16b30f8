"""Runs a model on one batch, for validation, the evaluate command and prediction."""

from __future__ import annotations

import torch

from detr_ray.detector.postprocess import postprocess
from detr_ray.loss import ClassLoss
from detr_ray.model import DetectionModel
from detr_ray.structures import Detections, PaddedBatch, to_device

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of ``train.precision`` -> number format of autocast; None for none."""


@torch.inference_mode()
def detect(
    model: DetectionModel,
    padded: PaddedBatch,
    device: torch.device,
    class_loss: ClassLoss,
    *,
    precision: str = "fp32",
    channels_last: bool = False,
    max_detections: int = 100,
) -> list[Detections]:
    """Detects objects on the images of a batch.

    Args:
        model: in evaluation mode, on ``device``.
        padded: the batch; boxes are in pixels of its ``orig_sizes``.
        device: where the model is.
        class_loss: the class loss of its training, which reads its logits.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        channels_last: lay images out with the channels last.
        max_detections: see `postprocess`.

    Returns:
        One entry an image, on ``device``.
    """
    batch = to_device(padded, device, model.pixels, channels_last)
    dtype = AUTOCAST_DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        outputs = model(batch.images, batch.mask)
    return postprocess(outputs, batch.orig_sizes.to(device), class_loss, max_detections)
