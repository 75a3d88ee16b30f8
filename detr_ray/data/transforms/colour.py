"""Changes of colour and sharpness, as torchvision's v2 functionals define them; boxes and sizes stay as they are.

torchvision is imported when the first step is done: the import takes a second, and planning does not need it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_ray.data.random_numbers import below, between
from detr_ray.data.sample import AnySizeStep, Picture, Step
from detr_ray.data.transforms.colour_arithmetic import change_colours
from detr_ray.data.transforms.sequence import DrawnOneByOne

# All orders of red, green and blue but the usual one.
_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


class _KeepsSize:
    """Base of transforms after which a picture has the size that it had before."""

    __slots__ = ()

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """See `Transform`."""
        return sizes


@dataclass(frozen=True, slots=True)
class Photometric(_KeepsSize):
    """Changes brightness, contrast, saturation, hue and the order of the channels, in this order.

    Attributes:
        brightness: factors are from 1 minus this to 1 plus this.
        contrast: the same.
        saturation: the same.
        hue: hues are turned by at most this, in turns of the colour wheel, 0..0.5.
        channel_order: probability that red, green and blue change places.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    channel_order: float

    draws_per_sample: ClassVar[int] = 6

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        spans = [(1 - most, 1 + most) for most in (self.brightness, self.contrast, self.saturation)]
        spans.append((-self.hue, self.hue))
        factors = np.stack([between(span, numbers) for span, numbers in zip(spans, uniform.T, strict=False)], axis=1)
        orders = below(np.array(len(_ORDERS)), uniform[:, 5])
        is_reordered = uniform[:, 4] < self.channel_order

        def steps_at(place: int) -> tuple[Step, ...]:
            brightness, contrast, saturation, hue = factors[place].tolist()
            order = _ORDERS[orders[place]] if is_reordered[place] else None
            return (ChangeColours(brightness, contrast, saturation, hue, order),)

        return DrawnOneByOne(sizes, steps_at)


@dataclass(frozen=True, slots=True)
class ChangeColours(AnySizeStep):
    """What `Photometric` drew for one sample; ``channels`` says which channel each one becomes, None for no change."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    channels: tuple[int, int, int] | None

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        changed = change_colours(picture.pixels.numpy(), self.brightness, self.contrast, self.saturation, self.hue)
        pixels = torch.from_numpy(changed)
        if self.channels is not None:
            pixels = pixels[:, :, list(self.channels)]
        return Picture(pixels, picture.instances)


def _as_image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.pixels.contiguous().numpy())


def _with_pixels(picture: Picture, pixels: Tensor) -> Picture:
    """The picture with other pixels, ``[3, H, W]``."""
    return Picture(pixels.permute(1, 2, 0), picture.instances)


@dataclass(frozen=True, slots=True)
class Grayscale(_KeepsSize):
    """Makes a picture grey."""

    draws_per_sample: ClassVar[int] = 0

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        return DrawnOneByOne(sizes, lambda place: (MakeGrey(),))


@dataclass(frozen=True, slots=True)
class MakeGrey(AnySizeStep):
    """All three channels become the picture's brightness."""

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        from torchvision.transforms.v2 import functional

        return _with_pixels(picture, functional.rgb_to_grayscale(picture.pixels.permute(2, 0, 1), 3))


@dataclass(frozen=True, slots=True)
class Blur(_KeepsSize):
    """Blurs with a Gaussian.

    Attributes:
        sigma: least and most standard deviation, pixels.
    """

    sigma: tuple[float, float]

    draws_per_sample: ClassVar[int] = 1

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        sigmas = between(self.sigma, uniform[:, 0])
        return DrawnOneByOne(sizes, lambda place: (BlurPixels(float(sigmas[place])),))


@dataclass(frozen=True, slots=True)
class BlurPixels:
    """A Gaussian of this standard deviation, pixels; cut off at three of them, or at the picture's side."""

    sigma: float

    def kernel(self, height: int, width: int) -> list[int]:
        """Width and height of the kernel, pixels."""
        reach = max(1, math.ceil(3 * self.sigma))
        return [2 * min(reach, side - 1) + 1 for side in (width, height)]

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        from torchvision.transforms.v2 import functional

        kernel = self.kernel(picture.pixels.shape[0], picture.pixels.shape[1])
        return _with_pixels(picture, functional.gaussian_blur(picture.pixels.permute(2, 0, 1), kernel, [self.sigma]))


@dataclass(frozen=True, slots=True)
class Jpeg(_KeepsSize):
    """Leaves the traces of JPEG compression.

    Attributes:
        quality: least and most, 1..100.
    """

    quality: tuple[int, int]

    draws_per_sample: ClassVar[int] = 1

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> DrawnOneByOne:
        """See `Transform`."""
        least, most = self.quality
        qualities = least + below(np.array(most - least + 1), uniform[:, 0])
        return DrawnOneByOne(sizes, lambda place: (CompressJpeg(int(qualities[place])),))


@dataclass(frozen=True, slots=True)
class CompressJpeg:
    """Encodes and decodes the picture as a JPEG of this quality, 1..100."""

    quality: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        # What torchvision's functional does, which warns at each call that its encoder will move to another package.
        file = io.BytesIO()
        _as_image(picture).save(file, "JPEG", quality=self.quality)
        return Picture(torch.from_numpy(np.array(Image.open(file))), picture.instances)
