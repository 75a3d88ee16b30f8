"""Boxes as torch tensors: formats, area, IoU and GIoU.

The project uses two formats; the name of a variable says which:

* ``boxes_cxcywh``: centre x, centre y, width, height; in 0..1 of the unpadded image.
* ``boxes_xyxy_px``: left, top, right, bottom in pixels (``boxes_xyxy`` where the unit does not matter).

Boxes of COCO files, ``[left, top, width, height]`` in pixels, are called ``boxes_xywh_px``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Converts ``[..., 4]`` centre/size boxes to corner boxes, in the same unit."""
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Converts ``[..., 4]`` boxes from corners to centre and size."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return torch.stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Area of ``[..., 4]`` corner boxes; zero for boxes with negative width or height."""
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def _overlap(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union areas of two broadcastable sets of corner boxes."""
    top_left = torch.maximum(boxes_xyxy_a[..., :2], boxes_xyxy_b[..., :2])
    bottom_right = torch.minimum(boxes_xyxy_a[..., 2:], boxes_xyxy_b[..., 2:])
    side = (bottom_right - top_left).clamp(min=0)
    intersection = side[..., 0] * side[..., 1]
    return intersection, area(boxes_xyxy_a) + area(boxes_xyxy_b) - intersection


def iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Intersection over union of broadcastable corner boxes.

    Args:
        boxes_xyxy_a: ``[..., 4]``; ``[N, 1, 4]`` and ``[1, M, 4]`` give all pairs.
        boxes_xyxy_b: ``[..., 4]``.

    Returns:
        IoU in 0..1 of the broadcast shape; 0 for two boxes without area.
    """
    intersection, union = _overlap(boxes_xyxy_a, boxes_xyxy_b)
    return torch.where(union > 0, intersection / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def generalized_iou(boxes_xyxy_a: Tensor, boxes_xyxy_b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of broadcastable corner boxes.

    Args:
        boxes_xyxy_a: ``[..., 4]``; ``[N, 1, 4]`` and ``[1, M, 4]`` give all pairs.
        boxes_xyxy_b: ``[..., 4]``.

    Returns:
        GIoU in -1..1 of the broadcast shape; finite also for boxes without area.
    """
    tiny = torch.finfo(boxes_xyxy_a.dtype).tiny
    intersection, union = _overlap(boxes_xyxy_a, boxes_xyxy_b)
    top_left = torch.minimum(boxes_xyxy_a[..., :2], boxes_xyxy_b[..., :2])
    bottom_right = torch.maximum(boxes_xyxy_a[..., 2:], boxes_xyxy_b[..., 2:])
    side = (bottom_right - top_left).clamp(min=0)
    hull = side[..., 0] * side[..., 1]
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
