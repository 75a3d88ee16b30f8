"""One sample of a batch: its plan, its pixels, and the objects on it.

A plan is made before a pixel is read. It holds the steps of the augmentation, with all their parameters. Knows nothing
of random numbers, of files or of the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True, slots=True, eq=False)
class Instances:
    """The objects on one image, as columns.

    Attributes:
        boxes_xyxy_px: ``[N, 4]`` float32, inside of the image.
        labels: ``[N]`` int64.
        size: (height, width) in pixels of the image that the boxes are measured on.
    """

    boxes_xyxy_px: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]

    def flip(self, axis: int) -> Instances:
        """Mirrors them: top to bottom (axis 0) or left to right (axis 1)."""
        first, last = 1 - axis, 3 - axis
        boxes = self.boxes_xyxy_px.copy()
        boxes[:, [first, last]] = self.size[axis] - self.boxes_xyxy_px[:, [last, first]]
        return Instances(boxes, self.labels, self.size)

    def scale(self, size: tuple[int, int]) -> Instances:
        """Scales them to another size of the image: (height, width) in pixels."""
        ratios = _per_corner((size[0] / self.size[0], size[1] / self.size[1]))
        return Instances(self.boxes_xyxy_px * ratios, self.labels, size)

    def crop(self, top: int, left: int, height: int, width: int) -> Instances:
        """Cuts out a part of the image, in pixels: boxes are clipped to it, and removed if nothing of them is left."""
        boxes = (self.boxes_xyxy_px - _per_corner((top, left))).clip(0, _per_corner((height, width)))
        is_left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return Instances(boxes[is_left], self.labels[is_left], (height, width))

    def rotate(self, quarter_turns: int) -> Instances:
        """Turns them counter-clockwise, so many times by 90 degrees."""
        boxes, (height, width) = self.boxes_xyxy_px, self.size
        for _ in range(quarter_turns % 4):
            left, top, right, bottom = boxes.T
            boxes = np.stack([top, width - right, bottom, width - left], axis=1)
            height, width = width, height
        return Instances(boxes, self.labels, (height, width))

    def place(self, top: int, left: int, size: tuple[int, int]) -> Instances:
        """Moves them as the image is put onto a larger one of ``size``, its corner at (top, left); all in pixels."""
        return Instances(self.boxes_xyxy_px + _per_corner((top, left)), self.labels, size)

    def select(self, keep: np.ndarray) -> Instances:
        """Those of ``keep``: ``[N]`` bool, or numbers."""
        return Instances(self.boxes_xyxy_px[keep], self.labels[keep], self.size)

    def join(self, others: Sequence[Instances]) -> Instances:
        """These and others, which are measured on an image of the same size."""
        every = (self, *others)
        boxes = np.concatenate([instances.boxes_xyxy_px for instances in every])
        return Instances(boxes, np.concatenate([instances.labels for instances in every]), self.size)

    def areas(self) -> np.ndarray:
        """``[N]`` float32, square pixels."""
        return (self.boxes_xyxy_px[:, 2:] - self.boxes_xyxy_px[:, :2]).prod(axis=1)

    def boxes_cxcywh(self) -> np.ndarray:
        """The boxes as ``[N, 4]`` float32 cxcywh, in 0..1 of the image."""
        left_top, right_bottom = self.boxes_xyxy_px[:, :2], self.boxes_xyxy_px[:, 2:]
        boxes = np.concatenate([(left_top + right_bottom) / 2, right_bottom - left_top], axis=1)
        return boxes / _per_corner(self.size)


def _per_corner(values: tuple[float, float]) -> np.ndarray:
    """(vertical, horizontal) in the order of a box's numbers: x, y, x, y."""
    return np.array([values[1], values[0], values[1], values[0]], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Margin:
    """A single colour around the pixels of a picture.

    Attributes:
        size: (height, width) of the whole in pixels.
        top: pixels above the picture's own.
        left: pixels left of them.
        fill_value: value of red, green and blue, 0..255.
    """

    size: tuple[int, int]
    top: int
    left: int
    fill_value: int

    def resize(self, inner: tuple[int, int], size: tuple[int, int]) -> tuple[Margin, tuple[int, int]]:
        """The margin after the whole picture is resized, in whole pixels; and the new size of the part inside."""
        corners = []
        for first, length, old, new in zip((self.top, self.left), inner, self.size, size, strict=True):
            start = min(round(first * new / old), new - 1)
            corners.append((start, max(round((first + length) * new / old), start + 1) - start))
        (top, height), (left, width) = corners
        return Margin(size, top, left, self.fill_value), (height, width)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image with the objects on it.

    Attributes:
        inner: ``[h, w, 3]`` uint8 RGB, not written to.
        instances: the objects. Their boxes may be measured on the image at another size than its own: an image may be
            decoded at a fraction of its size.
        margin: what is around ``inner``. It is filled when `pixels` is read: a canvas may be 16 times as large as the
            image, and most of it is usually cropped or made smaller next.
    """

    inner: Tensor
    instances: Instances
    margin: Margin | None = None

    @property
    def pixels(self) -> Tensor:
        """``[H, W, 3]`` uint8 RGB, not to be written to: the whole picture with its margin, if there is one."""
        if self.margin is None:
            return self.inner
        (height, width), margin = self.inner.shape[:2], self.margin
        pixels = torch.full((*margin.size, 3), margin.fill_value, dtype=torch.uint8)
        pixels[margin.top : margin.top + height, margin.left : margin.left + width] = self.inner
        return pixels

    def resize(self, size: tuple[int, int]) -> Picture:
        """Brings it to a size, (height, width) in pixels.

        Bilinear with antialiasing, in whole numbers. This is what `torchvision.transforms.v2.functional.resize` does to
        such bytes, to the last bit, without the second that importing torchvision takes.
        """
        if self.margin is not None:
            return self._resize_inside(self.margin, size)
        pixels = self.inner
        if pixels.shape[:2] != size:
            batch = pixels.contiguous().unsqueeze(0).permute(0, 3, 1, 2)
            batch = interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)
            pixels = batch.permute(0, 2, 3, 1).squeeze(0)
        return Picture(pixels, self.instances.scale(size))

    def _resize_inside(self, margin: Margin, size: tuple[int, int]) -> Picture:
        if margin.size == size:
            return self
        height, width = self.inner.shape[:2]
        instances = self.instances.crop(margin.top, margin.left, height, width)
        margin, inner = margin.resize((height, width), size)
        return Picture(self.inner, instances).resize(inner).place(margin)

    def place(self, margin: Margin) -> Picture:
        """Puts it onto a larger one."""
        return Picture(self.pixels, self.instances.place(margin.top, margin.left, margin.size), margin)

    def flip(self, axis: int) -> Picture:
        """Mirrors it: top to bottom (axis 0) or left to right (axis 1)."""
        margin = self.margin
        if margin is not None and axis == 0:
            margin = replace(margin, top=margin.size[0] - margin.top - self.inner.shape[0])
        elif margin is not None:
            margin = replace(margin, left=margin.size[1] - margin.left - self.inner.shape[1])
        return Picture(self.inner.flip(axis), self.instances.flip(axis), margin)

    def crop(self, top: int, left: int, height: int, width: int) -> Picture:
        """Cuts out a part, in pixels."""
        instances, margin = self.instances.crop(top, left, height, width), self.margin
        if margin is None:
            return Picture(self.inner[top : top + height, left : left + width], instances)
        first, last = (max(top, margin.top), max(left, margin.left)), (top + height, left + width)
        rows = slice(first[0] - margin.top, max(last[0] - margin.top, 0))
        columns = slice(first[1] - margin.left, max(last[1] - margin.left, 0))
        inner = self.inner[rows, columns]
        if not inner.numel():  # nothing but margin is left
            return Picture(torch.full((height, width, 3), margin.fill_value, dtype=torch.uint8), instances)
        return Picture(inner, instances, Margin((height, width), first[0] - top, first[1] - left, margin.fill_value))


class Step(Protocol):
    """One step of a plan: something that is done to a picture. Steps are small values; equal ones do the same."""

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """The picture after the step.

        Args:
            picture: before it.
            partners: the other pictures of the sample, for steps that put several together.
        """
        ...


class AnySizeStep:
    """Base of steps that do the same to a picture whatever its size, so that it may be decoded at a fraction of it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Flip(AnySizeStep):
    """Mirrors top to bottom (axis 0) or left to right (axis 1)."""

    axis: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return picture.flip(self.axis)


@dataclass(frozen=True, slots=True)
class Resize:
    """Brings the picture to a size, (height, width) in pixels."""

    size: tuple[int, int]

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return picture.resize(self.size)


@dataclass(frozen=True, slots=True)
class Crop:
    """Cuts out a part of the picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return picture.crop(self.top, self.left, self.height, self.width)


@dataclass(frozen=True, slots=True)
class Place:
    """Puts the picture onto a larger one of a single colour.

    Attributes:
        size: (height, width) in pixels that the picture is brought to first.
        margin: what is around it then.
    """

    size: tuple[int, int]
    margin: Margin

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return picture.resize(self.size).place(self.margin)


@dataclass(frozen=True, slots=True)
class Partner:
    """Another image of the planner's window that becomes a part of a sample; chosen by the size policy.

    Attributes:
        place: its row in the window.
        size: (height, width) in pixels that it is resized to before the images are put together.
        steps: what is done to it before that, in this order.
    """

    place: int
    size: tuple[int, int]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What happens to one image on its way into a batch; decided before a pixel is read.

    Attributes:
        position: place in the training stream (``step * global_batch_size + slot``); in validation, the place in the
            validation order. A partner has the position of its sample.
        index: row of the data set's index.
        image_id: the annotations' id of the image.
        size: final (height, width) in pixels: the picture is brought to it after all steps.
        steps: what is done to the picture, in this order.
        partners: plans of the other images that steps combine with this one, each at its own ``size``.
    """

    position: int
    index: int
    image_id: int
    size: tuple[int, int]
    steps: tuple[Step, ...] = ()
    partners: tuple[SamplePlan, ...] = ()

    @property
    def images(self) -> tuple[int, ...]:
        """Rows of the index of the images to read: its own, then those of each partner in turn."""
        return (self.index, *chain.from_iterable(partner.images for partner in self.partners))

    def first_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """The size that the image is resized to first, if it is stored with the given size."""
        changes = (step for step in self.steps if not isinstance(step, AnySizeStep))
        first = next(changes, Resize(self.size))
        return first.size if isinstance(first, Resize | Place) else stored

    def apply(self, picture: Picture, partners: Sequence[Picture] = ()) -> Picture:
        """Applies all steps to the picture; ``partners`` has one picture for each partner."""
        for step in self.steps:
            picture = step.apply(picture, partners)
        return picture.resize(self.size)


def resized_sizes(sizes: np.ndarray, short: np.ndarray, max_size: int | None = None) -> np.ndarray:
    """Sizes of images after their short side is brought to ``short``, rounded as the published code does it.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels.
        short: ``[n]`` or one number, pixels.
        max_size: if the long side would exceed this, the short side is made smaller (rounded, half to even); the long
            side, rounded down, may then differ from it by a pixel.

    Returns:
        ``[n, 2]`` int32 (height, width), at least 1 pixel.
    """
    # Column by column: a reduction over rows of two numbers takes several times as long.
    heights, widths = np.ascontiguousarray(sizes.T, dtype=np.int64)
    shortest, longest = np.minimum(heights, widths), np.maximum(heights, widths)
    short = np.broadcast_to(np.asarray(short, dtype=np.int64), shortest.shape)
    if max_size is not None:
        too_long = longest / shortest * short > max_size
        short = np.where(too_long, np.rint(max_size * shortest / longest).astype(np.int64).clip(min=1), short)
    long = np.where(shortest == short, longest, (short * longest / shortest).astype(np.int64))
    is_wide = widths >= heights
    resized = np.empty((len(heights), 2), np.int32)
    resized[:, 0] = np.where(is_wide, short, long)
    resized[:, 1] = np.where(is_wide, long, short)
    return resized
