"""One sample of a batch: what is planned for it, and what that does to its pixels and to the objects on it.

A plan is made before a pixel is read. It holds the steps that change shape or place, which the augmentation has decided
on. Knows nothing of random numbers, of files or of the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
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
        """Brings them to another size of the image: (height, width) in pixels."""
        ratios = _per_corner((size[0] / self.size[0], size[1] / self.size[1]))
        return Instances(self.boxes_xyxy_px * ratios, self.labels, size)

    def crop(self, top: int, left: int, height: int, width: int) -> Instances:
        """Cuts out a part of the image, in pixels: boxes are clipped to it, those of which nothing is left are gone."""
        boxes = (self.boxes_xyxy_px - _per_corner((top, left))).clip(0, _per_corner((height, width)))
        is_left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return Instances(boxes[is_left], self.labels[is_left], (height, width))

    def boxes_cxcywh(self) -> np.ndarray:
        """The boxes as ``[N, 4]`` float32 cxcywh, in 0..1 of the image."""
        left_top, right_bottom = self.boxes_xyxy_px[:, :2], self.boxes_xyxy_px[:, 2:]
        boxes = np.concatenate([(left_top + right_bottom) / 2, right_bottom - left_top], axis=1)
        return boxes / _per_corner(self.size)


def _per_corner(values: tuple[float, float]) -> np.ndarray:
    """(vertical, horizontal) in the order of a box's numbers: x, y, x, y."""
    return np.array([values[1], values[0], values[1], values[0]], dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image with the objects on it.

    Attributes:
        pixels: ``[H, W, 3]`` uint8 RGB, not written to.
        instances: the objects. Their boxes may be measured on the image at another size than ``H, W``: an image may be
            decoded at a fraction of its size.
    """

    pixels: Tensor
    instances: Instances

    def resize(self, size: tuple[int, int]) -> Picture:
        """Brings it to a size, (height, width) in pixels.

        Bilinear with antialiasing, in whole numbers. This is what `torchvision.transforms.v2.functional.resize` does to
        such bytes, to the last bit, without the second that importing torchvision takes.
        """
        pixels = self.pixels
        if pixels.shape[:2] != size:
            batch = pixels.contiguous().unsqueeze(0).permute(0, 3, 1, 2)
            batch = interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)
            pixels = batch.permute(0, 2, 3, 1).squeeze(0)
        return Picture(pixels, self.instances.scale(size))


class Step(Protocol):
    """One change of shape or place that a plan holds. Steps are small values that compare by what they do."""

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """The picture after the step.

        Args:
            picture: before it.
            partners: the other pictures of the sample, for steps that put several together.
        """
        ...


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirrors top to bottom (axis 0) or left to right (axis 1)."""

    axis: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return Picture(picture.pixels.flip(self.axis), picture.instances.flip(self.axis))


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
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        instances = picture.instances.crop(self.top, self.left, self.height, self.width)
        return Picture(picture.pixels[rows, columns], instances)


@dataclass(frozen=True, slots=True)
class Partner:
    """Another image of a planner's window that a sample is made of, beside its own; a size policy chooses it.

    Attributes:
        place: its row of what the policy was given for the window.
        size: (height, width) in pixels that it is brought to before it is put together with the others.
        steps: what is done to it before, in this order.
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
        seed: where random numbers for what does not change the size begin (changes of colour, say); 64 bits.
        partners: plans of other images that steps put together with this one, each at its own ``size``.
    """

    position: int
    index: int
    image_id: int
    size: tuple[int, int]
    steps: tuple[Step, ...] = ()
    seed: int = 0
    partners: tuple[SamplePlan, ...] = ()

    @property
    def images(self) -> tuple[int, ...]:
        """Rows of the index whose images are read: its own, then its partners', each followed by that one's own."""
        return (self.index, *chain.from_iterable(partner.images for partner in self.partners))

    def first_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """The size that the image is brought to first, from that at which it is stored."""
        changes = (step for step in self.steps if not isinstance(step, Flip))
        first = next(changes, Resize(self.size))
        return first.size if isinstance(first, Resize) else stored

    def apply(self, picture: Picture, partners: Sequence[Picture] = ()) -> Picture:
        """What becomes of the picture; one picture for each of the partners."""
        for step in self.steps:
            picture = step.apply(picture, partners)
        return picture.resize(self.size)


def resized_sizes(sizes: np.ndarray, short: np.ndarray, max_size: int | None = None) -> np.ndarray:
    """Sizes of images after their short side is brought to ``short``, rounded as the published code does it.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels.
        short: ``[n]`` or one number, pixels.
        max_size: where the long side would pass it, the short side is made smaller instead (rounded, half to even);
            the long side, cut off to whole pixels, may then differ from it by rounding.

    Returns:
        ``[n, 2]`` int32 (height, width), at least 1 pixel.
    """
    # Column by column: reducing rows of two takes several times as long.
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
