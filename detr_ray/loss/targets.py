"""All boxes of a micro-batch in one tensor, with the image of each.

Operations over all boxes replace a loop over images, and images without boxes need no special case. Knows nothing of
predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr_ray.structures import Target


@dataclass(frozen=True, slots=True)
class FlatTargets:
    """All ``M`` boxes of a micro-batch of ``B`` images, on the device of the predictions.

    Attributes:
        labels: ``[M]`` int64.
        boxes_cxcywh: ``[M, 4]`` float32 in 0..1 of the unpadded image.
        images: ``[M]`` int64, the image of each box as its place in the micro-batch.
        counts: boxes of each image, on the host; sums to M.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    images: Tensor
    counts: tuple[int, ...]


def flatten_targets(targets: Sequence[Target], device: torch.device) -> FlatTargets:
    """Concatenates the targets of all images.

    Nothing is read from the device: the counts come from the tensors' shapes.

    Raises:
        ValueError: there is no image, or an image has not one label for each box of four numbers.
    """
    if not targets:
        raise ValueError("the criterion needs at least one image, got an empty list of targets")
    for i, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.ndim != 1 or tuple(boxes.shape) != (labels.shape[0], 4):
            raise ValueError(
                f"targets of image {i} of the micro-batch: labels must be [N] and boxes [N, 4], "
                f"got {list(labels.shape)} and {list(boxes.shape)}"
            )
    counts = tuple(target["labels"].shape[0] for target in targets)
    images = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return FlatTargets(
        labels=torch.cat([target["labels"] for target in targets]).to(device, torch.int64, non_blocking=True),
        boxes_cxcywh=torch.cat([target["boxes"] for target in targets]).to(device, torch.float32, non_blocking=True),
        images=images.to(device, non_blocking=True),
        counts=counts,
    )
