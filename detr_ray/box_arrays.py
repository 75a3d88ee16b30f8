"""Converts the formats of boxes in numpy arrays, for modules that do not import torch; see `boxes` for tensors.

Formats have the same names as there; ``boxes_xywh`` are left, top, width, height.
"""

from __future__ import annotations

import numpy as np


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """Converts ``[N, 4]`` boxes from left, top, width and height to corners, in the same unit."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Converts ``[N, 4]`` boxes from corners to left, top, width and height, in the same unit."""
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def cxcywh_to_xyxy(boxes_cxcywh: np.ndarray) -> np.ndarray:
    """Converts ``[N, 4]`` boxes from centre and size to corners, in the same unit."""
    half = boxes_cxcywh[:, 2:] / 2
    return np.concatenate([boxes_cxcywh[:, :2] - half, boxes_cxcywh[:, :2] + half], axis=1)
