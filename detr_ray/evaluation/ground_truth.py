"""Ground truth as plain columns, under the names of the data set's index, and as pycocotools' object.

It knows neither files nor data sets: whoever has the columns hands them in.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """Annotated boxes of ``I`` images and ``A`` annotations.

    Attributes:
        image_ids: ``[I]`` int64, each once.
        heights: ``[I]`` pixels.
        widths: ``[I]`` pixels.
        first_box: ``[I+1]`` int64; the boxes of image ``i`` are the rows ``first_box[i]:first_box[i+1]``.
        boxes_xywh_px: ``[A, 4]`` left, top, width, height in pixels, as in the annotation file.
        category_ids: ``[A]`` int64.
        areas: ``[A]`` pixels; COCO's small, medium and large go by it.
        is_crowd: ``[A]`` bool; crowd regions are neither found nor missed, detections inside them are ignored.
        annotation_ids: ``[A]`` int64, the annotation file's; scoring does not use them.
        categories: (id, name) of each category that is scored.
    """

    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
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
        """Takes the columns of any object that has them under these names; no array is copied.

        Raises:
            AttributeError: ``source`` lacks a column.
        """
        return cls(**{column.name: getattr(source, column.name) for column in fields(cls)})

    def category_names(self) -> dict[int, str]:
        """A name for each category id, made unique by the id where the file gives one name twice or none."""
        names = [name for _, name in self.categories]
        return {
            category_id: name if name and names.count(name) == 1 else f"{name or 'category'} {category_id}"
            for category_id, name in self.categories
        }

    def to_coco(self) -> COCO:
        """These annotations as the object that pycocotools works on.

        Annotations are numbered anew from 1: pycocotools takes a match with an annotation of id 0 for no match, and of
        two annotations with one id it keeps the last. Boxes that are not numbers are left out, since pycocotools would
        let them match every detection.
        """
        image_of_box = np.repeat(np.asarray(self.image_ids), np.diff(self.first_box))
        readable = np.isfinite(self.boxes_xywh_px).all(axis=1) & np.isfinite(self.areas)
        if not readable.all():
            rows = np.flatnonzero(~readable)
            logger.warning(
                "%d annotated boxes are not numbers and are not scored, e.g. annotation %d of image %d",
                len(rows),
                self.annotation_ids[rows[0]],
                image_of_box[rows[0]],
            )
        annotations = annotation_dicts(
            image_of_box[readable],
            self.category_ids[readable],
            self.boxes_xywh_px[readable],
            self.areas[readable],
            iscrowd=self.is_crowd[readable].astype(np.int64),
        )
        sizes = zip(self.image_ids.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True)
        images = [{"id": image_id, "height": height, "width": width} for image_id, height, width in sizes]
        names = [{"id": category_id, "name": name} for category_id, name in self.category_names().items()]
        return coco_of(images, names, annotations)


def annotation_dicts(
    image_ids: np.ndarray, category_ids: np.ndarray, boxes_xywh_px: np.ndarray, areas: np.ndarray, **more: np.ndarray
) -> list[dict[str, Any]]:
    """Rows as the dicts that pycocotools works on, numbered from 1; ``more`` are further columns by key."""
    columns = {"image_id": image_ids, "category_id": category_ids, "bbox": boxes_xywh_px, "area": areas, **more}
    keys = ("id", *columns)
    ids = range(1, len(image_ids) + 1)
    values = (column.tolist() for column in columns.values())
    return [dict(zip(keys, row, strict=True)) for row in zip(ids, *values, strict=True)]


def coco_of(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    """A ``COCO`` object with its indices filled, as ``createIndex`` fills them, without what that one prints."""
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.imgs = {image["id"]: image for image in images}
    coco.cats = {category["id"]: category for category in categories}
    coco.anns = {annotation["id"]: annotation for annotation in annotations}
    coco.imgToAnns, coco.catToImgs = defaultdict(list), defaultdict(list)
    for annotation in annotations:
        coco.imgToAnns[annotation["image_id"]].append(annotation)
        coco.catToImgs[annotation["category_id"]].append(annotation["image_id"])
    return coco
