"""A model without what only training needs: in place for predictions, as a copy for export."""

from __future__ import annotations

import copy

from detr_ray.model.backbones.resnet import fold_frozen_norms
from detr_ray.model.deformable_attention import DeformableAttention, sample_grid
from detr_ray.model.detection_model import DetectionModel


def reduce_to_inference(model: DetectionModel) -> None:
    """Leaves out of a model what predictions do not need, in place; they stay the same.

    Frozen norms are folded into their convolutions once, instead of in each forward pass, and only the last decoder
    layer's predictions are given. The model can no longer train, nor load a state dict.
    """
    model.eval().requires_grad_(False)
    model.aux_loss = False
    fold_frozen_norms(model)


def exportable(model: DetectionModel) -> DetectionModel:
    """A copy of a model that predicts the same and can be traced.

    It is reduced to inference (`reduce_to_inference`), deformable attention reads its points by `sample_grid`, and it
    is on the CPU in fp32.
    """
    copied = copy.deepcopy(model).cpu().float()
    reduce_to_inference(copied)
    for module in copied.modules():
        if isinstance(module, DeformableAttention):
            module.sampler = sample_grid
    return copied
