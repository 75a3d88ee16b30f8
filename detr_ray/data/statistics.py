"""What the annotations of a split amount to: boxes per image and per category, as training and evaluation count them.

Works on whole columns. Knows nothing of pixels, labels or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.data.index import CocoIndex


@dataclass(frozen=True, slots=True, eq=False)
class BoxStatistics:
    """Counts of the boxes that can be learnt: no crowds, with area inside of their image.

    Attributes:
        per_image: ``[I]`` int64, boxes of each image.
        per_category: category id -> boxes, for every category of the annotation file.
    """

    per_image: np.ndarray
    per_category: dict[int, int]

    @property
    def most(self) -> int:
        """Boxes of the fullest image."""
        return int(self.per_image.max(initial=0))

    @property
    def num_empty_images(self) -> int:
        """Images without a box to learn."""
        return int((self.per_image == 0).sum())

    def percentile(self, share: float) -> int:
        """Boxes that ``share`` percent of the images do not have more than."""
        return int(np.ceil(np.percentile(self.per_image, share))) if len(self.per_image) else 0

    def images_above(self, limit: int) -> int:
        """Images with more boxes than ``limit``."""
        return int((self.per_image > limit).sum())


def count_boxes(index: CocoIndex) -> BoxStatistics:
    """Counts what `CocoIndex.training_boxes` would give for every image."""
    annotations_per_image = np.diff(index.first_box)
    image_of = np.repeat(np.arange(len(index)), annotations_per_image)
    boxes = index.boxes_xywh_px.astype(np.float32)
    left, top = boxes[:, 0], boxes[:, 1]
    right, bottom = left + boxes[:, 2], top + boxes[:, 3]
    widths, heights = index.widths[image_of], index.heights[image_of]
    has_area = (right.clip(0, widths) > left.clip(0, widths)) & (bottom.clip(0, heights) > top.clip(0, heights))
    learnt = ~index.is_crowd & has_area
    ids, counts = np.unique(index.category_ids[learnt], return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return BoxStatistics(
        per_image=np.bincount(image_of[learnt], minlength=len(index)),
        per_category={category_id: found.get(category_id, 0) for category_id, _ in index.categories},
    )
