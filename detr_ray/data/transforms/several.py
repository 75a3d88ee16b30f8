"""Samples that are made of several images of a window: mosaic, mixup, copy and paste.

The other images are taken as they are stored: transforms that come before are done to the sample's own image alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from detr_ray.data.random_numbers import below, between, numbers_of, seed_from
from detr_ray.data.sample import Instances, Partner, Picture, Resize, Step
from detr_ray.data.transforms.sequence import DrawnOneByOne


def other_places(numbers: np.ndarray) -> np.ndarray:
    """For each sample of a window the places of other samples, all different. Too small windows repeat places.

    Args:
        numbers: ``[n, k]`` in [0, 1): one for each of k places.
    """
    count, many = numbers.shape
    chosen = np.zeros((count, many), np.int64)
    for k in range(many):
        steps = below(np.array(max(count - 1 - k, 1)), numbers[:, k])
        for earlier in np.sort(chosen[:, :k], axis=1).T:  # skips the places that are taken
            steps = steps + (steps >= earlier)
        chosen[:, k] = steps
    return (np.arange(count)[:, None] + 1 + chosen) % count


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Four images in one, which is as large as the sample's own: a part of each fills one of its quarters.

    Source: Bochkovskiy et al. 2020 (YOLOv4); here no quarter has empty space.

    Attributes:
        centre: smallest and largest position of the point where they meet, as a share of the picture's side.
        zoom: smallest and largest zoom into each image; at 1 the part is the largest with the quarter's aspect ratio.
        min_visible: share of a box that must be in the part, or the object is left out.
    """

    centre: tuple[float, float]
    zoom: tuple[float, float]
    min_visible: float

    # The point where they meet, three other images, and for each of the four: zoom, top, left.
    draws_per_sample: ClassVar[int] = 2 + 3 + 4 * 3

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        count = len(sizes)
        canvas = sizes.clip(min=2)  # each quarter has a pixel
        before = np.rint(canvas * between(self.centre, uniform[:, :2])).astype(np.int64).clip(1, canvas - 1)
        after = canvas - before
        others = other_places(uniform[:, 2:5])
        # Top left, top right, bottom left, bottom right: [n, 4, 2] (height, width).
        quarters = np.stack(
            [
                np.stack([before[:, 0], before[:, 1]], axis=1), np.stack([before[:, 0], after[:, 1]], axis=1),
                np.stack([after[:, 0], before[:, 1]], axis=1), np.stack([after[:, 0], after[:, 1]], axis=1),
            ], axis=1,
        )  # fmt: skip
        images = np.concatenate([sizes[:, None], stored[others]], axis=1)
        numbers = uniform[:, 5:].reshape(count, 4, 3)
        ratio = (images / quarters).min(axis=2, keepdims=True) / between(self.zoom, numbers[..., :1])
        lengths = np.rint(quarters * ratio).astype(np.int64).clip(1, images)
        corners = below(images - lengths + 1, numbers[..., 1:])

        def part(place: int, k: int) -> CropVisible:
            (top, left), (height, width) = corners[place, k].tolist(), lengths[place, k].tolist()
            return CropVisible(top, left, height, width, self.min_visible)

        def quarter(place: int, k: int) -> tuple[int, int]:
            height, width = quarters[place, k].tolist()
            return height, width

        def steps_at(place: int) -> tuple[Step, ...]:
            height, width = canvas[place].tolist()
            return (part(place, 0), Resize(quarter(place, 0)), Tile((height, width)))

        def partners_at(place: int) -> tuple[Partner, ...]:
            others_of_it = others[place].tolist()
            return tuple(Partner(others_of_it[k - 1], quarter(place, k), (part(place, k),)) for k in (1, 2, 3))

        return DrawnOneByOne(canvas, steps_at, partners_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes.clip(min=2)


@dataclass(frozen=True, slots=True)
class CropVisible:
    """Cuts out a part of the picture, in pixels, without objects of which less than ``min_visible`` is in it."""

    top: int
    left: int
    height: int
    width: int
    min_visible: float

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        kept = picture.instances.select(self.visible(picture.instances) >= self.min_visible)
        return replace(picture, instances=kept).crop(self.top, self.left, self.height, self.width)

    def visible(self, instances: Instances) -> np.ndarray:
        """``[N]``: share of each box that is in the part."""
        boxes = instances.boxes_xyxy_px
        first = np.maximum(boxes[:, :2], (self.left, self.top))
        last = np.minimum(boxes[:, 2:], (self.left + self.width, self.top + self.height))
        return (last - first).clip(min=0).prod(axis=1) / np.maximum(instances.areas(), 1e-9)


@dataclass(frozen=True, slots=True)
class Tile:
    """Puts the picture in the upper left of a canvas, and its three partners around it.

    Attributes:
        size: (height, width) of the canvas in pixels, which the four fill.
    """

    size: tuple[int, int]

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        height, width = picture.instances.size
        pixels = torch.empty((*self.size, 3), dtype=torch.uint8)
        placed = []
        corners = ((0, 0), (0, width), (height, 0), (height, width))
        for tile, (top, left) in zip((picture, *partners), corners, strict=True):
            rows, columns = tile.instances.size
            pixels[top : top + rows, left : left + columns] = tile.pixels
            placed.append(tile.instances.place(top, left, self.size))
        return Picture(pixels, placed[0].join(placed[1:]))


def _one_other(
    sizes: np.ndarray, numbers: np.ndarray, stored: np.ndarray
) -> tuple[np.ndarray, Callable[[int], tuple[Partner, ...]]]:
    """One other image for each sample, as large as it can be inside of it.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels of the samples.
        numbers: ``[n, 1]`` in [0, 1): which image.
        stored: ``[n, 2]`` (height, width) of the stored images.

    Returns:
        ``[n, 2]`` sizes that the others get, and what gives the partners of a place of the window.
    """
    others = other_places(numbers)[:, 0]
    scale = (sizes / stored[others]).min(axis=1, keepdims=True)
    fitted = (stored[others] * scale + 1e-6).astype(np.int64).clip(1, sizes)

    def partners_at(place: int) -> tuple[Partner, ...]:
        height, width = fitted[place].tolist()
        return (Partner(int(others[place]), (height, width)),)

    return fitted, partners_at


@dataclass(frozen=True, slots=True)
class Mixup:
    """Blends another image into the picture, as large as fits; the objects of both are there.

    Source: Zhang et al. 2019 (Bag of Freebies for object detection), here without weights of the objects.

    Attributes:
        weight: smallest and largest weight of the sample's own image; the other one has the rest.
    """

    weight: tuple[float, float]

    draws_per_sample: ClassVar[int] = 4

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        fitted, partners_at = _one_other(sizes, uniform[:, :1], stored)
        weights = between(self.weight, uniform[:, 1])
        corners = below(sizes - fitted + 1, uniform[:, 2:4])

        def steps_at(place: int) -> tuple[Step, ...]:
            return (Blend(float(weights[place]), *corners[place].tolist()),)

        return DrawnOneByOne(sizes, steps_at, partners_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes


@dataclass(frozen=True, slots=True)
class Blend:
    """Blends the only partner in, its corner at (top, left); the picture has ``weight`` there, the partner the rest."""

    weight: float
    top: int
    left: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        (partner,) = partners
        height, width = partner.instances.size
        pixels = picture.pixels.clone()
        region = pixels[self.top : self.top + height, self.left : self.left + width]
        mixed = torch.lerp(partner.pixels.to(torch.float32), region.to(torch.float32), self.weight)
        region.copy_(mixed.round_())
        placed = partner.instances.place(self.top, self.left, picture.instances.size)
        return Picture(pixels, picture.instances.join([placed]))


@dataclass(frozen=True, slots=True)
class CopyPaste:
    """Pastes the boxes of some objects of another image, each at a random place where it hides little.

    Attributes:
        max_objects: largest number of objects that are pasted; the number is drawn from 1 to this.
        min_visible: share of every box that must not be hidden by all that is pasted.
    """

    max_objects: int
    min_visible: float

    draws_per_sample: ClassVar[int] = 2

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        _, partners_at = _one_other(sizes, uniform[:, :1], stored)

        def steps_at(place: int) -> tuple[Step, ...]:
            return (PasteBoxes(self.max_objects, self.min_visible, seed_from(uniform[place, 1])),)

        return DrawnOneByOne(sizes, steps_at, partners_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes


_PLACES = 10
"""Places that are tried for each pasted object."""


@dataclass(frozen=True, slots=True)
class PasteBoxes:
    """Pastes boxes of the only partner; which and where follows from the seed and the objects.

    Other objects of the partner that lie in a pasted box are pasted with it. An object is not pasted if no place is
    found that leaves ``min_visible`` of every box visible.
    """

    max_objects: int
    min_visible: float
    seed: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        (partner,) = partners
        objects = partner.instances
        numbers = numbers_of(self.seed, 1 + len(objects.labels) + self.max_objects * _PLACES * 2)
        count = 1 + int(below(np.array(self.max_objects), numbers[0]))
        chosen = np.argsort(numbers[1 : 1 + len(objects.labels)])[:count]
        places = numbers[1 + len(objects.labels) :].reshape(self.max_objects, _PLACES, 2)

        pixels, instances = picture.pixels.clone(), picture.instances
        hidden = np.zeros(len(instances.labels))
        for box, numbers_of_it in zip(objects.boxes_xyxy_px[chosen], places, strict=False):
            patch = _patch(partner, box, self.min_visible)
            height, width = patch.instances.size
            corners = below(np.array(instances.size) - (height, width) + 1, numbers_of_it)
            for top, left in corners.tolist():
                then_hidden = hidden + CropVisible(top, left, height, width, 0).visible(instances)
                if (then_hidden <= 1 - self.min_visible).all():
                    pixels[top : top + height, left : left + width] = patch.pixels
                    instances = instances.join([patch.instances.place(top, left, instances.size)])
                    hidden = np.concatenate([then_hidden, np.zeros(len(patch.instances.labels))])
                    break
        return Picture(pixels, instances)


def _patch(picture: Picture, box_xyxy_px: np.ndarray, min_visible: float) -> Picture:
    """The part of a picture that a box covers, by whole pixels, with all objects that are seen in it."""
    height, width = picture.instances.size
    left, top = np.floor(box_xyxy_px[:2]).astype(int).clip(0, (width - 1, height - 1)).tolist()
    right, bottom = np.ceil(box_xyxy_px[2:]).astype(int).clip((left + 1, top + 1), (width, height)).tolist()
    return CropVisible(top, left, bottom - top, right - left, min_visible).apply(picture, ())
