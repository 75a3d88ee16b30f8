"""Rectangles of a picture that are covered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detr_ray.data.random_numbers import below, between
from detr_ray.data.sample import Picture, Step
from detr_ray.data.transforms.sequence import DrawnOneByOne


@dataclass(frozen=True, slots=True)
class CutOut:
    """Covers rectangles with one colour; objects of which too little is left are removed.

    Source: DeVries and Taylor 2017, here with rectangles of several sizes.

    Attributes:
        holes: least and most number of rectangles.
        size: least and most side of a rectangle, in sides of the picture.
        fill_value: value of red, green and blue in them, 0..255.
        min_visible: share of a box that must be left.
    """

    holes: tuple[int, int]
    size: tuple[float, float]
    fill_value: int
    min_visible: float

    @property
    def draws_per_sample(self) -> int:
        """See `Transform`."""
        return 1 + 4 * self.holes[1]

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        least, most = self.holes
        counts = least + below(np.array(most - least + 1), uniform[:, 0])
        numbers = uniform[:, 1:].reshape(len(sizes), most, 4)
        lengths = (between(self.size, numbers[..., :2]) * sizes[:, None]).astype(np.int64).clip(1, sizes[:, None])
        corners = below(sizes[:, None] - lengths + 1, numbers[..., 2:])

        def steps_at(place: int) -> tuple[Step, ...]:
            holes = np.concatenate([corners[place], lengths[place]], axis=1)[: counts[place]].tolist()
            return (Cover(tuple(map(tuple, holes)), self.fill_value, self.min_visible),)

        return DrawnOneByOne(sizes, steps_at)

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes


@dataclass(frozen=True, slots=True)
class Cover:
    """Covers rectangles, (top, left, height, width) in pixels each."""

    holes: tuple[tuple[int, ...], ...]
    fill_value: int
    min_visible: float

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        pixels = picture.pixels.clone()
        is_covered = np.zeros(pixels.shape[:2], bool)
        for top, left, height, width in self.holes:
            pixels[top : top + height, left : left + width] = self.fill_value
            is_covered[top : top + height, left : left + width] = True
        instances = picture.instances
        corners = np.concatenate(
            [np.floor(instances.boxes_xyxy_px[:, :2]), np.ceil(instances.boxes_xyxy_px[:, 2:])], axis=1
        )
        visible = [1 - is_covered[y1:y2, x1:x2].mean() for x1, y1, x2, y2 in corners.astype(int).tolist()]
        return Picture(pixels, instances.select(np.array(visible, float) >= self.min_visible))
