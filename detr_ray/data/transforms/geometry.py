"""Changes of place and size of one picture: mirrors, quarter turns, zooming out, cropping, large jitter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from detr_ray.data.random_numbers import below, between, choice, numbers_of, seed_from
from detr_ray.data.sample import Crop, Flip, Instances, Margin, Picture, Place, Step
from detr_ray.data.transforms.sequence import DrawnOneByOne


@dataclass(frozen=True, slots=True)
class Mirror:
    """Mirrors top to bottom (axis 0) or left to right (axis 1)."""

    axis: int

    draws_per_sample: ClassVar[int] = 0

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        return DrawnOneByOne(sizes, lambda place: (Flip(self.axis),))

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes


@dataclass(frozen=True, slots=True)
class Rotate90:
    """Turns by right angles.

    Attributes:
        turns: numbers of quarter turns, counter-clockwise, one of which is drawn.
    """

    turns: tuple[int, ...]

    draws_per_sample: ClassVar[int] = 1

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        turns = choice(self.turns, uniform[:, 0])
        size = np.where(turns[:, None] % 2 == 1, sizes[:, ::-1], sizes)
        return DrawnOneByOne(size, lambda place: (Turn(int(turns[place])),))

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return np.concatenate([sizes, sizes[:, ::-1]])


@dataclass(frozen=True, slots=True)
class Turn:
    """Turns counter-clockwise by so many right angles."""

    quarters: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return Picture(picture.pixels.rot90(self.quarters), picture.instances.rotate(self.quarters))


@dataclass(frozen=True, slots=True)
class ZoomOut:
    """Puts the picture somewhere on a larger canvas.

    Source: Liu et al. 2016 (SSD), section 3.6.

    Attributes:
        scale: least and most side of the canvas, in sides of the picture; at least 1.
        fill_value: value of red, green and blue around the picture, 0..255.
    """

    scale: tuple[float, float]
    fill_value: int

    draws_per_sample: ClassVar[int] = 3

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        canvas = (sizes * between(self.scale, uniform[:, :1])).astype(np.int32)
        corner = below(canvas - sizes + 1, uniform[:, 1:3])

        def steps_at(place: int) -> tuple[Step, ...]:
            (height, width), (canvas_height, canvas_width) = sizes[place].tolist(), canvas[place].tolist()
            top, left = corner[place].tolist()
            return (Place((height, width), Margin((canvas_height, canvas_width), top, left, self.fill_value)),)

        return DrawnOneByOne(canvas, steps_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return np.concatenate([(sizes * scale).astype(np.int32) for scale in self.scale])


@dataclass(frozen=True, slots=True)
class IouCrop:
    """Cuts out a part around objects, of any size; objects whose centre is outside of it are removed.

    As in Liu et al. 2016 (SSD), with one difference: the size of the part is drawn first and kept, so that it is known
    before annotations are read; only its place depends on the objects.

    Attributes:
        scale: smallest and largest side of the part, as a share of the picture's.
        aspect: smallest and largest width of the part, divided by its height.
        min_iou: IoU that the part must have with one object, one of which is drawn.
    """

    scale: tuple[float, float]
    aspect: tuple[float, float]
    min_iou: tuple[float, ...]

    draws_per_sample: ClassVar[int] = 4

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        least, most = self.scale
        height_scale = between(self.scale, uniform[:, 0])
        # Widths within the aspect ratios. If an image is too oblong for any, the nearest width is taken.
        square = height_scale * sizes[:, 0] / sizes[:, 1]
        low, high = ((square * aspect).clip(least, most) for aspect in self.aspect)
        width_scale = low + (high - low) * uniform[:, 1]
        size = (sizes * np.stack([height_scale, width_scale], axis=1)).astype(np.int32).clip(min=1)
        ious = below(np.array(len(self.min_iou)), uniform[:, 2])

        def steps_at(place: int) -> tuple[Step, ...]:
            height, width = size[place].tolist()
            return (CropAroundObjects(height, width, self.min_iou[ious[place]], seed_from(uniform[place, 3])),)

        return DrawnOneByOne(size, steps_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        (least, most), (narrow, wide) = self.scale, self.aspect
        heights, widths = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
        extremes = [
            (height, (height * aspect).clip(widths * least, widths * most))
            for height in (heights * least, heights * most)
            for aspect in (narrow, wide)
        ]
        return np.concatenate([np.stack(pair, axis=1) for pair in extremes]).astype(np.int32).clip(min=1)


_TRIALS = 40


@dataclass(frozen=True, slots=True)
class CropAroundObjects:
    """Cuts out a part of this size where there are objects.

    The first of 40 places that are drawn from the seed is taken at which the centre of an object lies inside and the
    part has at least ``min_iou`` with such an object. If none is like that, it is the place with the highest IoU; if no
    centre lies inside of any, the part is put around the centre of an object.
    """

    height: int
    width: int
    min_iou: float
    seed: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        top, left = self.corner(picture.instances)
        boxes = picture.instances.boxes_xyxy_px
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - (left, top)
        is_inside = ((centres > 0) & (centres < (self.width, self.height))).all(axis=1)
        kept = replace(picture, instances=picture.instances.select(is_inside))
        return kept.crop(top, left, self.height, self.width)

    def corner(self, instances: Instances) -> tuple[int, int]:
        """(top, left) of the part, pixels."""
        numbers = numbers_of(self.seed, 2 * _TRIALS + 1)
        room = np.array(instances.size) - (self.height, self.width)
        corners = below(room + 1, numbers[:-1].reshape(-1, 2))
        if not len(instances.labels):
            return int(corners[0, 0]), int(corners[0, 1])
        ious = self._ious(corners, instances.boxes_xyxy_px)
        best = np.where(ious.max() < self.min_iou, ious.argmax(), (ious >= max(self.min_iou, 1e-9)).argmax())
        if ious[best] > 0:
            return int(corners[best, 0]), int(corners[best, 1])
        box = instances.boxes_xyxy_px[below(np.array(len(instances.labels)), numbers[-1])]
        centre = np.array([box[1] + box[3], box[0] + box[2]]) / 2
        top, left = (centre - (self.height / 2, self.width / 2)).astype(int).clip(0, room).tolist()
        return top, left

    def _ious(self, corners: np.ndarray, boxes_xyxy_px: np.ndarray) -> np.ndarray:
        """``[trials]``: highest IoU of each place with an object whose centre is inside; 0 where there is none."""
        first = corners[:, None, ::-1].astype(np.float64)
        last = first + np.array([self.width, self.height])
        boxes = boxes_xyxy_px[None].astype(np.float64)
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        is_inside = ((centres > first) & (centres < last)).all(axis=2)
        shared = (np.minimum(last, boxes[..., 2:]) - np.maximum(first, boxes[..., :2])).clip(min=0).prod(axis=2)
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(axis=2)
        ious = shared / (areas + self.height * self.width - shared)
        return np.where(is_inside, ious, 0).max(axis=1)


@dataclass(frozen=True, slots=True)
class ScaleJitter:
    """Large-scale jitter: enlarged or made smaller, then cut or filled to a square of a fixed size.

    Source: Ghiasi et al. 2021 (Simple Copy-Paste), section 3.

    Attributes:
        size: side of the square, pixels.
        scale: least and most size of the picture; at 1 its long side is as long as the square's.
        fill_value: value of red, green and blue around the picture, 0..255.
    """

    size: int
    scale: tuple[float, float]
    fill_value: int

    draws_per_sample: ClassVar[int] = 3

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        scale = between(self.scale, uniform[:, :1]) * self.size / sizes.max(axis=1, keepdims=True)
        scaled = np.rint(sizes * scale).astype(np.int64).clip(min=1)
        # The part that will be cropped is not enlarged first.
        cut = np.where(scaled > self.size, np.rint(self.size / scale), sizes).astype(np.int64).clip(1, sizes)
        inner = np.minimum(scaled, self.size)
        cut_corner = below(sizes - cut + 1, uniform[:, 1:3])
        corner = below(self.size - inner + 1, uniform[:, 1:3])

        def steps_at(place: int) -> tuple[Step, ...]:
            (height, width), (top, left) = inner[place].tolist(), corner[place].tolist()
            placed = Place((height, width), Margin((self.size, self.size), top, left, self.fill_value))
            if (cut[place] == sizes[place]).all():
                return (placed,)
            return (Crop(*cut_corner[place].tolist(), *cut[place].tolist()), placed)

        return DrawnOneByOne(np.full_like(sizes, self.size), steps_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return np.array([[self.size, self.size]])
