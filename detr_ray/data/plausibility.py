"""Boxes that are written in another way than COCO's: found by what all of them have in common.

A file of such boxes is read without an error, and a detector learns nothing from it. What is said here is said where
nearly all boxes of a split agree and none of an ordinary one would; single odd boxes are counted by `index.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.data.index import CocoIndex

_NEARLY_ALL = 0.95
_ALL_BUT_ERRORS = 0.99
_SMALLEST_SIDE_PX = 8
"""Images below this have boxes of about a pixel."""
_FEWEST_CORNERS = 10
_FAR_OUTSIDE = 0.1
_SHARE_FAR_OUTSIDE = 0.3
_FEWEST_AT_ONE = 50
_SHARE_AT_ONE = 0.02
_GATHERED = 2


@dataclass(frozen=True, slots=True)
class Misreading:
    """Something that is wrong with the boxes of a split as a whole.

    Attributes:
        message: what was found.
        advice: what to do about it.
        ruins: whether training on it, or evaluating, is for nothing; it costs a little precision otherwise.
    """

    message: str
    advice: str
    ruins: bool


def find_misreadings(index: CocoIndex) -> list[Misreading]:
    """What is wrong with the boxes of a split as a whole."""
    found = (_fractions(index), _corners(index), _counted_from_one(index))
    return [misreading for misreading in found if misreading is not None]


def _sides(index: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each box's image."""
    counts = np.diff(index.first_box)
    return np.repeat(index.widths, counts), np.repeat(index.heights, counts)


def _fractions(index: CocoIndex) -> Misreading | None:
    boxes = index.boxes_xywh_px
    if not len(boxes) or np.median(np.minimum(index.widths, index.heights)) < _SMALLEST_SIDE_PX:
        return None
    is_fraction = ((boxes >= -0.05) & (boxes <= 1.05)).all(axis=1)
    if is_fraction.mean() < _NEARLY_ALL:
        return None
    return Misreading(
        f"{is_fraction.sum()} of {len(boxes)} boxes lie within 0..1: they look normalised to the image's size",
        "COCO's boxes are left, top, width, height in pixels: multiply them by width and height of the image (and "
        "where they are YOLO's, whose first two numbers are the middle, take away half of width and height)",
        ruins=True,
    )


def _corners(index: CocoIndex) -> Misreading | None:
    boxes = index.boxes_xywh_px
    if len(boxes) < _FEWEST_CORNERS:
        return None
    first, second, third, fourth = boxes.T
    widths, heights = _sides(index)
    are_corners = (
        (first >= 0) & (second >= 0) & (third > first) & (fourth > second) & (third <= widths + 1)
        & (fourth <= heights + 1)
    )  # fmt: skip
    # As left, top, width and height so many boxes would end far beyond their images.
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


def _counted_from_one(index: CocoIndex) -> Misreading | None:
    starts = index.boxes_xywh_px[:, :2]
    at_one, at_two = int((starts == 1).sum()), int((starts == 2).sum())
    # Objects that touch the border gather at the first pixel; without them nothing can be told.
    is_gathered = at_one >= max(_FEWEST_AT_ONE, _SHARE_AT_ONE * starts.size, _GATHERED * at_two)
    if not is_gathered or starts.min() < 1:
        return None
    return Misreading(
        f"the boxes look counted from 1: left or top is 1 in {at_one} of {len(starts)}, and never less",
        "COCO counts pixels from 0: take 1 from left and top of each box",
        ruins=False,
    )
