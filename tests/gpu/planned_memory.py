"""How much memory a training step will take at its highest, planned before a pixel is read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_ray.config import Config
from detr_ray.model import build_model

_BYTES = 4


def planned_bytes(config: Config, num_classes: int, images: int, height: int, width: int) -> int:
    """Bytes of a step in fp32: weights, gradients, AdamW's two moments, the images, and what backward needs.

    The forward pass runs on tensors that have shapes and no memory; what it would keep for the backward pass is
    counted, each piece of memory once. What is there for a moment only is not: workspaces of convolutions, and
    gradients of activations, which come as activations go.

    Args:
        config: has the model.
        num_classes: classes without no-object.
        images: of the micro-batch.
        height: of its images in pixels.
        width: likewise.
    """
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return value

    with FakeTensorMode():
        model = build_model(config.model, num_classes).train()
        pixels = torch.empty(images, 3, height, width)
        mask = torch.empty(images, height, width, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            outputs = model(pixels, mask)
        state = [*model.parameters(), *model.buffers()]
        for value in (*state, pixels):
            kept.pop(value.untyped_storage()._cdata, None)
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        numbers = sum(value.numel() for value in state) + 3 * trained + pixels.numel()
        del outputs
    return _BYTES * numbers + sum(kept.values())
