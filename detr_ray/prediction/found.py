"""The detections of one image, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_ray.box_arrays import xyxy_to_xywh


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The ``K`` objects found on one image, highest scores first.

    Attributes:
        image: name of the image.
        size: (height, width) in pixels of the image as given, turned as its EXIF orientation says.
        boxes_xyxy_px: ``[K, 4]`` float32 left, top, right, bottom in pixels of that image; may end outside of it.
        scores: ``[K]`` float32 in 0..1.
        category_ids: ``[K]`` int64, ids of the annotations that the model was trained on.
        names: ``[K]`` names of the categories.
    """

    image: str
    size: tuple[int, int]
    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def boxes_xywh_px(self) -> np.ndarray:
        """``[K, 4]`` float32 left, top, width, height in pixels, as COCO's results have them."""
        return xyxy_to_xywh(self.boxes_xyxy_px)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "image": self.image,
            "height": self.size[0],
            "width": self.size[1],
            "boxes_xyxy_px": self.boxes_xyxy_px.tolist(),
            "scores": self.scores.tolist(),
            "category_ids": self.category_ids.tolist(),
            "names": list(self.names),
        }
