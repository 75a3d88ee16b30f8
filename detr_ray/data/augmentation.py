"""The training augmentation of DETR: what is drawn for a sample, and the steps that this makes.

Each sample is mirrored or not. Then its short side is resized to a random scale; or it is resized to a small scale,
cropped at random, and the crop is resized to a random scale. All of it follows from the image's size and eight numbers
in 0..1. It is computed for many samples at once, without their pixels. Knows nothing of the order of samples or of
files.

Source of the rules: Carion et al. 2020, section A.4, and the transforms of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from detr_ray.data.random_numbers import below, choice
from detr_ray.data.sample import Crop, Flip, Partner, Resize, Step, resized_sizes

_DECIDING_SIZE = slice(1, 6)
"""Of a sample's random numbers, those that decide its final size."""

# The resize before a crop has no limit for the long side. An image whose long side would exceed this limit (35 times as
# long as wide at the default scales) is not cropped: it would take gigabytes in between.
LONGEST_UNCUT_PX = 21_000


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What was drawn for ``n`` samples, as columns.

    Attributes:
        flip: ``[n]`` bool.
        resize: ``[n, 2]`` int32 (height, width); zeros where nothing is cropped.
        crop: ``[n, 4]`` int32 (top, left, height, width) of the resized image; zeros where nothing is cropped.
        size: ``[n, 2]`` int32 (height, width), final.
    """

    flip: np.ndarray
    resize: np.ndarray
    crop: np.ndarray
    size: np.ndarray

    def steps(self, places: np.ndarray) -> list[tuple[Step, ...]]:
        """What is done to some of the samples, up to their final size."""
        samples = []
        columns = (column[places].tolist() for column in (self.flip, self.resize, self.crop, self.size))
        for flip, (height, width), crop, size in zip(*columns, strict=True):
            steps: list[Step] = [Flip(1)] if flip else []
            if height:
                steps += [Resize((height, width)), Crop(*crop)]
            samples.append((*steps, Resize((size[0], size[1]))))
        return samples

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        """None: each sample is one image."""
        return [()] * len(places)


@dataclass(frozen=True, slots=True)
class DetrAugmentation:
    """The original's augmentation, as a `Transform`; its name in a configuration is ``detr``.

    Attributes:
        flip: probability of mirroring left to right.
        scales: final lengths of the short side, pixels.
        max_size: longest allowed long side, pixels.
        crop: probability that an image is cropped.
        crop_scales: lengths of the short side before the crop, pixels.
        crop_min: smallest side of a crop, pixels; smaller only where the image itself is.
        crop_max: largest side of a crop, pixels.
        shared_draws: number of samples of similar aspect ratio in a window of the stream that share the random numbers
            for their final size (crop or not, scales, sides of the crop). 1: each has its own, as in the published
            code. With more, small data sets need less padding, and workers get more even shares.
    """

    flip: float
    scales: tuple[int, ...]
    max_size: int
    crop: float
    crop_scales: tuple[int, ...]
    crop_min: int
    crop_max: int
    shared_draws: int

    # Flip, branch, scale, crop scale, crop width, crop height, crop top, crop left.
    draws_per_sample: ClassVar[int] = 8

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray | None = None) -> Draws:
        """Turns random numbers into what happens to each sample of a window.

        Args:
            sizes: ``[n, 2]`` (height, width) of the images in pixels.
            uniform: ``[n, draws_per_sample]`` in [0, 1).
            stored: sizes that other images of the window are stored with; none of them is used.
        """
        uniform = share_draws(uniform, sizes, self.shared_draws)
        u_flip, u_crop, u_scale, u_crop_scale, u_width, u_height, u_top, u_left = np.ascontiguousarray(uniform.T)
        resize = resized_sizes(sizes, choice(self.crop_scales, u_crop_scale))
        is_cropped = (u_crop < self.crop) & (np.maximum(resize[:, 0], resize[:, 1]) <= LONGEST_UNCUT_PX)
        crop_height = _between(self.crop_min, resize[:, 0], self.crop_max, u_height)
        crop_width = _between(self.crop_min, resize[:, 1], self.crop_max, u_width)
        top = below(resize[:, 0] - crop_height + 1, u_top)
        left = below(resize[:, 1] - crop_width + 1, u_left)
        crop = np.stack([top, left, crop_height, crop_width], axis=1) * is_cropped[:, None]
        before = np.where(is_cropped[:, None], crop[:, 2:], sizes)
        return Draws(
            flip=u_flip < self.flip,
            resize=resize * is_cropped[:, None],
            crop=crop.astype(np.int32),
            size=resized_sizes(before, choice(self.scales, u_scale), self.max_size),
        )

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return np.array([[self.largest_side(sizes)] * 2])

    def largest_side(self, sizes: np.ndarray) -> int:
        """Length in pixels that no side of an augmented image exceeds, whatever is drawn.

        Args:
            sizes: ``[n, 2]`` (height, width) of the images before it in pixels, at least one.
        """
        longest = max(int(resized_sizes(sizes, np.array(short), self.max_size).max()) for short in self.scales)
        if not self.crop:
            return longest
        for short in self.crop_scales:
            sides = resized_sizes(sizes, np.array(short)).astype(np.int64)
            least, most = np.minimum(self.crop_min, sides), np.minimum(self.crop_max, sides)
            # The most oblong crop: as long as possible along one side, as short as possible along the other.
            ratio = float(max((most[:, 0] / least[:, 1]).max(), (most[:, 1] / least[:, 0]).max(), 1))
            for scale in self.scales:
                long = int(scale * ratio)
                longest = max(longest, long if long <= self.max_size else self.max_size + int(ratio / 2), scale)
        return longest


def share_draws(uniform: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Gives samples of similar aspect ratio the same random numbers for their final size.

    Which numbers a sample gets does not depend on its own shape. So the distribution for a single sample is the same as
    without sharing, but samples are no longer independent of each other.

    Args:
        uniform: ``[n, draws_per_sample]``.
        sizes: ``[n, 2]`` (height, width) of the stored images.
        count: number of samples that share; 1 for no sharing.

    Returns:
        The numbers to use, ``[n, draws_per_sample]``.
    """
    if count == 1:
        return uniform
    by_aspect = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")
    givers = by_aspect[np.arange(len(sizes)) // count * count]
    shared = uniform.copy()
    shared[by_aspect, _DECIDING_SIZE] = uniform[givers, _DECIDING_SIZE]
    return shared


def _between(least: int, side: np.ndarray, most: int, uniform: np.ndarray) -> np.ndarray:
    """Whole numbers least..most, both included, and neither above the side that they are cut out of."""
    low, high = np.minimum(least, side), np.minimum(side, most)
    return low + below(high - low + 1, uniform)
