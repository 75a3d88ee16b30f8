"""Counts the boxes of a split, and finds splits whose boxes seem to be in another format than they ought to.

Works on whole columns. Knows nothing of pixels, labels or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.data.index import DatasetIndex

_NEARLY_ALL = 0.95
_ALL_BUT_ERRORS = 0.99
_SMALLEST_SIDE_PX = 8
"""Images below this have boxes of about a pixel."""
_FEWEST_CORNERS = 10
_FAR_OUTSIDE = 0.1
_SHARE_FAR_OUTSIDE = 0.3
_SHARE_TURNED = 0.1
_FEWEST_AT_ONE = 50
_SHARE_AT_ONE = 0.02
_GATHERED = 2


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
        """The largest number of boxes of an image."""
        return int(self.per_image.max(initial=0))

    @property
    def num_empty_images(self) -> int:
        """Images without a box to learn."""
        return int((self.per_image == 0).sum())

    def percentile(self, share: float) -> int:
        """The number of boxes that ``share`` percent of the images do not exceed."""
        return int(np.ceil(np.percentile(self.per_image, share))) if len(self.per_image) else 0

    def images_above(self, limit: int) -> int:
        """Images with more boxes than ``limit``."""
        return int((self.per_image > limit).sum())


def count_boxes(index: DatasetIndex) -> BoxStatistics:
    """Counts what `DatasetIndex.training_instances` would give for every image."""
    image_of, category_ids = learnt_boxes(index)
    ids, counts = np.unique(category_ids, return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return BoxStatistics(
        per_image=np.bincount(image_of, minlength=len(index)),
        per_category={category_id: found.get(category_id, 0) for category_id, _ in index.categories},
    )


def learnt_boxes(index: DatasetIndex) -> tuple[np.ndarray, np.ndarray]:
    """Row of the image, and category id, of each box that `DatasetIndex.training_instances` would give."""
    annotations_per_image = np.diff(index.first_box)
    image_of = np.repeat(np.arange(len(index)), annotations_per_image)
    boxes = index.boxes_xywh_px.astype(np.float32)
    left, top = boxes[:, 0], boxes[:, 1]
    right, bottom = left + boxes[:, 2], top + boxes[:, 3]
    widths, heights = index.widths[image_of], index.heights[image_of]
    has_area = (right.clip(0, widths) > left.clip(0, widths)) & (bottom.clip(0, heights) > top.clip(0, heights))
    learnt = ~index.is_crowd & has_area
    return image_of[learnt], index.category_ids[learnt]


@dataclass(frozen=True, slots=True)
class Misreading:
    """Something that is wrong with the boxes of a split as a whole.

    Attributes:
        message: what was found.
        advice: what to do about it.
        ruins: whether training or evaluation with these boxes is useless; otherwise they are a little less precise.
    """

    message: str
    advice: str
    ruins: bool


def find_misreadings(index: DatasetIndex) -> list[Misreading]:
    """What is wrong with the boxes of a split as a whole.

    A file whose boxes are in another format than that of their data set can be read without an error, but a detector
    learns nothing from it. It is reported if nearly all boxes of the split look like that; single odd boxes are counted
    in the index.
    """
    found = (_fractions(index), _corners(index), _sizes_for_corners(index), _counted_from_one(index))
    return [misreading for misreading in found if misreading is not None]


def _sides(index: DatasetIndex) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each box's image."""
    counts = np.diff(index.first_box)
    return np.repeat(index.widths, counts), np.repeat(index.heights, counts)


def _fractions(index: DatasetIndex) -> Misreading | None:
    boxes = index.boxes_xywh_px
    if not len(boxes) or np.median(np.minimum(index.widths, index.heights)) < _SMALLEST_SIDE_PX:
        return None
    is_fraction = ((boxes >= -0.05) & (boxes <= 1.05)).all(axis=1)
    if is_fraction.mean() < _NEARLY_ALL:
        return None
    return Misreading(
        f"{is_fraction.sum()} of {len(boxes)} boxes lie within 0..1: they look normalised to the image's size",
        "boxes are in pixels here: multiply them by width and height of the image (and "
        "where they are YOLO's, whose first two numbers are the middle, take away half of width and height)",
        ruins=True,
    )


def _corners(index: DatasetIndex) -> Misreading | None:
    boxes = index.boxes_xywh_px
    if len(boxes) < _FEWEST_CORNERS:
        return None
    first, second, third, fourth = boxes.T
    widths, heights = _sides(index)
    are_corners = (
        (first >= 0) & (second >= 0) & (third > first) & (fourth > second) & (third <= widths + 1)
        & (fourth <= heights + 1)
    )  # fmt: skip
    # Read as left, top, width and height, this many boxes would end far outside of their images.
    far = (first + third > (1 + _FAR_OUTSIDE) * widths) | (second + fourth > (1 + _FAR_OUTSIDE) * heights)
    if are_corners.mean() < _ALL_BUT_ERRORS or far.mean() < _SHARE_FAR_OUTSIDE:
        return None
    return Misreading(
        f"the boxes look like corners (left, top, right, bottom): the third number is above the first and the fourth "
        f"above the second in {are_corners.sum()} of {len(boxes)}, and {far.sum()} would end far outside of their "
        "image otherwise",
        "COCO's boxes are left, top, width, height: take the first number from the third and the second from the "
        "fourth",
        ruins=True,
    )


def _sizes_for_corners(index: DatasetIndex) -> Misreading | None:
    """Width and height where right and bottom ought to be, in formats that have corners."""
    boxes = index.boxes_xywh_px
    if len(boxes) < _FEWEST_CORNERS:
        return None
    first, second = boxes[:, 0], boxes[:, 1]
    third, fourth = first + boxes[:, 2], second + boxes[:, 3]
    widths, heights = _sides(index)
    are_sizes = (
        (first >= 0) & (second >= 0) & (third > 0) & (fourth > 0) & (first + third <= widths + 1)
        & (second + fourth <= heights + 1)
    )  # fmt: skip
    turned = (third <= first) | (fourth <= second)
    if are_sizes.mean() < _ALL_BUT_ERRORS or turned.mean() < _SHARE_TURNED:
        return None
    return Misreading(
        f"the boxes look like left, top, width, height, and were read as left, top, right, bottom: {turned.sum()} of "
        f"{len(boxes)} would end before they begin",
        "write right (left + width) and bottom (top + height) instead of width and height",
        ruins=True,
    )


def _counted_from_one(index: DatasetIndex) -> Misreading | None:
    starts = index.boxes_xywh_px[:, :2]
    at_one, at_two = int((starts == 1).sum()), int((starts == 2).sum())
    # Many objects touch the border, so many boxes begin at the first pixel; without such boxes nothing can be told.
    is_gathered = at_one >= max(_FEWEST_AT_ONE, _SHARE_AT_ONE * starts.size, _GATHERED * at_two)
    if not is_gathered or starts.min() < 1:
        return None
    return Misreading(
        f"the boxes look counted from 1: left or top is 1 in {at_one} of {len(starts)}, and never less",
        "COCO counts pixels from 0: take 1 from left and top of each box",
        ruins=False,
    )
