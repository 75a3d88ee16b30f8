"""Ground truth as plain columns, with the same names as the columns of the data set's index."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """Annotated boxes of ``I`` images and ``A`` annotations.

    Attributes:
        image_ids: ``[I]`` int64, unique.
        first_box: ``[I+1]`` int64; the boxes of image ``i`` are the rows ``first_box[i]:first_box[i+1]``.
        boxes_xywh_px: ``[A, 4]`` left, top, width, height in pixels, as in the annotation file.
        category_ids: ``[A]`` int64.
        areas: ``[A]`` pixels; decides whether a box is small, medium or large for COCO.
        is_crowd: ``[A]`` bool; crowd regions are neither found nor missed, detections inside them are ignored.
        annotation_ids: ``[A]`` int64, ids in the annotation file, used in messages only.
        categories: (id, name) of each category that is scored.
    """

    image_ids: np.ndarray
    first_box: np.ndarray
    boxes_xywh_px: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    annotation_ids: np.ndarray
    categories: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        images, boxes = len(self.image_ids), len(self.boxes_xywh_px)
        if self.first_box.shape != (images + 1,) or self.first_box[0] != 0 or self.first_box[-1] != boxes:
            raise ValueError(f"first_box must be [{images + 1}] from 0 to {boxes}, got {self.first_box.shape}")
        if self.boxes_xywh_px.shape != (boxes, 4):
            raise ValueError(f"boxes_xywh_px must be [A, 4], got {self.boxes_xywh_px.shape}")
        for name in ("category_ids", "areas", "is_crowd", "annotation_ids"):
            if getattr(self, name).shape != (boxes,):
                raise ValueError(f"{name} must be [{boxes}], got {getattr(self, name).shape}")
        unique, counts = np.unique(self.image_ids, return_counts=True)
        if len(unique) < images:
            raise ValueError(f"image id {unique[counts > 1][0]} is there {counts.max()} times")

    @classmethod
    def from_columns(cls, source: object) -> GroundTruth:
        """The columns of an object that has attributes with these names; no array is copied."""
        return cls(**{column.name: getattr(source, column.name) for column in fields(cls)})

    def category_names(self) -> dict[int, str]:
        """A name for each category id. The id is appended where a name is empty or used twice."""
        names = [name for _, name in self.categories]
        return {
            category_id: name if name and names.count(name) == 1 else f"{name or 'category'} {category_id}"
            for category_id, name in self.categories
        }

    def image_of_box(self) -> np.ndarray:
        """``[A]`` image id of each box."""
        return np.repeat(self.image_ids, np.diff(self.first_box))

    def readable_boxes(self) -> np.ndarray:
        """``[A]`` bool, whether box and area are finite numbers; logs a warning if some are not."""
        readable: np.ndarray = np.isfinite(self.boxes_xywh_px).all(axis=1) & np.isfinite(self.areas)
        if not readable.all():
            rows = np.flatnonzero(~readable)
            logger.warning(
                "%d annotated boxes are not numbers and are not scored, e.g. annotation %d of image %d",
                len(rows),
                self.annotation_ids[rows[0]],
                self.image_of_box()[rows[0]],
            )
        return readable
