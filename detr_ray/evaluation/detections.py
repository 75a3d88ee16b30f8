"""Detections of many images as four columns, which workers send to the scorer.

A row is 36 bytes, so 5,000 images with 100 detections each are 18 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_ray.box_arrays import xyxy_to_xywh

if TYPE_CHECKING:  # the scorer process must not import torch, which takes seconds
    from torch import Tensor

    from detr_ray.structures import Detections

NO_CATEGORY = -1


@dataclass(frozen=True, slots=True, eq=False)
class DetectionTable:
    """Scored boxes of many images, one a row.

    Attributes:
        image_ids: ``[K]`` int64, the annotation file's ids.
        category_ids: ``[K]`` int64, the annotation file's ids.
        boxes_xywh_px: ``[K, 4]`` float32 left, top, width, height in pixels of the stored image.
        scores: ``[K]`` float32.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh_px: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.image_ids.shape != (count,) or self.category_ids.shape != (count,) or self.scores.shape != (count,):
            raise ValueError(
                f"columns of a detection table must have one length: image_ids {self.image_ids.shape}, "
                f"category_ids {self.category_ids.shape}, scores {self.scores.shape}"
            )
        if self.boxes_xywh_px.shape != (count, 4):
            raise ValueError(f"boxes_xywh_px must be [{count}, 4], got {self.boxes_xywh_px.shape}")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> DetectionTable:
        """A table without rows."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.float32))

    @classmethod
    def concat(cls, tables: Iterable[DetectionTable]) -> DetectionTable:
        """The rows of all tables, in the given order."""
        parts = [cls.empty(), *tables]
        return cls(
            image_ids=np.concatenate([part.image_ids for part in parts]),
            category_ids=np.concatenate([part.category_ids for part in parts]),
            boxes_xywh_px=np.concatenate([part.boxes_xywh_px for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
        )

    def select(self, rows: np.ndarray) -> DetectionTable:
        """Some of the rows, by a mask (``[K]`` bool) or by row numbers."""
        return DetectionTable(
            self.image_ids[rows], self.category_ids[rows], self.boxes_xywh_px[rows], self.scores[rows]
        )

    @classmethod
    def from_detections(
        cls,
        image_ids: Sequence[int] | np.ndarray | Tensor,
        detections: Sequence[Detections],
        category_ids_of_label: np.ndarray,
        max_per_image: int = 100,
    ) -> DetectionTable:
        """Converts post-processed model outputs to rows.

        Detections whose label has no category are removed before the best ones are selected. Tensors on a GPU are
        copied to the host once for all images.

        Args:
            image_ids: one for each of ``detections``.
            detections: of each image; boxes in pixels of the stored image.
            category_ids_of_label: ``[C]`` int64, the category id of each label; -1 for a label without category.
            max_per_image: number of detections kept for each image, highest scores first (COCO's limit is 100).

        Raises:
            ValueError: Lengths differ, or a label is outside ``category_ids_of_label``.
        """
        import torch

        if len(image_ids) != len(detections):
            raise ValueError(f"{len(image_ids)} image ids for {len(detections)} images of detections")
        if not detections:
            return cls.empty()
        ids = _to_int64(image_ids)
        counts = np.array([len(one["scores"]) for one in detections], dtype=np.int64)
        labels = torch.cat([one["labels"] for one in detections]).cpu().numpy()
        scores = torch.cat([one["scores"] for one in detections]).float().cpu().numpy()
        boxes_xyxy_px = torch.cat([one["boxes"] for one in detections]).float().cpu().numpy()
        if labels.size and not 0 <= labels.min() <= labels.max() < len(category_ids_of_label):
            raise ValueError(
                f"labels {labels.min()}..{labels.max()} are outside the {len(category_ids_of_label)} known labels"
            )
        image_of_row = np.repeat(np.arange(len(ids)), counts)
        categories = np.asarray(category_ids_of_label, dtype=np.int64)[labels]
        kept = np.flatnonzero(categories != NO_CATEGORY)
        kept = _best_of_each_image(image_of_row, scores, kept, max_per_image)
        return cls(
            image_ids=ids[image_of_row[kept]],
            category_ids=categories[kept],
            boxes_xywh_px=xyxy_to_xywh(boxes_xyxy_px[kept]),
            scores=scores[kept],
        )

    def order(self) -> np.ndarray:
        """``[K]`` the rows by image id, then from the highest score to the lowest, then by box and category."""
        left, top, width, height = self.boxes_xywh_px.T
        return np.lexsort((self.category_ids, height, width, top, left, -self.scores, self.image_ids))

    def sorted(self) -> DetectionTable:
        """The rows in this order."""
        return self.select(self.order())

    def to_coco_results(self) -> list[dict[str, Any]]:
        """The rows in COCO's results format: dicts of image_id, category_id, bbox (xywh) and score."""
        columns = (self.image_ids, self.category_ids, self.boxes_xywh_px.astype(np.float64), self.scores)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box_xywh_px, "score": score}
            for image_id, category_id, box_xywh_px, score in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def coco_results_json(self) -> bytes:
        """The rows as a JSON file in COCO's results format."""
        return json.dumps(self.to_coco_results(), separators=(",", ":")).encode()


def _to_int64(image_ids: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    if not isinstance(image_ids, np.ndarray | Sequence):
        image_ids = image_ids.cpu().numpy()
    return np.asarray(image_ids, dtype=np.int64)


def _best_of_each_image(image_of_row: np.ndarray, scores: np.ndarray, rows: np.ndarray, limit: int) -> np.ndarray:
    """From ``rows``, the ``limit`` rows of each image with the highest scores; by image, best first."""
    ordered = rows[np.lexsort((-scores[rows], image_of_row[rows]))]
    _, first, counts = np.unique(image_of_row[ordered], return_index=True, return_counts=True)
    rank = np.arange(len(ordered)) - np.repeat(first, counts)
    return ordered[rank < limit]
