"""A copy of a model for export: with operators that runtimes support, and without what only training needs."""

from __future__ import annotations

import copy

from detr_ray.model.backbones.resnet import fold_frozen_norms
from detr_ray.model.deformable_attention import DeformableAttention, sample_grid
from detr_ray.model.detection_model import DetectionModel


def exportable(model: DetectionModel) -> DetectionModel:
    """A copy of a model that predicts the same and can be traced.

    Deformable attention reads its points by `sample_grid`, frozen norms are folded into their convolutions, and only
    the last decoder layer's predictions are given. It is on the CPU, in fp32 and in evaluation mode.
    """
    copied = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    copied.aux_loss = False
    for module in copied.modules():
        if isinstance(module, DeformableAttention):
            module.sampler = sample_grid
    fold_frozen_norms(copied)
    return copied
