"""What backbones give: feature maps with their padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_ray.structures import PixelStatistics


class FeatureLevel(NamedTuple):
    """One feature map of a batch.

    Attributes:
        features: ``[B, C, h, w]``.
        padding: ``[B, h, w]`` bool, True where a cell shows padding; None where nothing is padded.
        stride: pixels of the image a cell.
    """

    features: Tensor
    padding: Tensor | None
    stride: int


class Backbone(nn.Module):
    """A network that gives one or several feature maps, the one with the most cells first.

    Attributes:
        channels: channels of each map.
        strides: pixels of the image a cell of each map, ascending.
        pixels: how the images have to be normalised.
        layers: what the names of the parameters of each layer start with, from the image on; for learning rates that
            fall from layer to layer.
    """

    layers: tuple[tuple[str, ...], ...] = ()
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    pixels: PixelStatistics

    def maps(self, images: Tensor) -> Sequence[Tensor]:
        """The feature maps of ``[B, 3, H, W]`` normalised images, without their padding."""
        raise NotImplementedError

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[FeatureLevel, ...]:
        """Feature maps, each with the mask at its resolution.

        Args:
            images: ``[B, 3, H, W]`` normalised.
            mask: ``[B, H, W]`` bool, True on padding; None where nothing is padded.
        """
        return tuple(
            FeatureLevel(features, None if mask is None else shrink_mask(mask, *features.shape[-2:]), stride)
            for features, stride in zip(self.maps(images), self.strides, strict=True)
        )


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Reads a mask at the corner pixel of each cell (nearest interpolation).

    The first cell counts as valid whatever the mask says: attention over no cell at all gives NaN, and an image
    padded at the right and at the bottom has its first cell anyway.

    Args:
        mask: ``[B, H, W]`` bool, True on padding.
        height: rows of cells.
        width: columns of cells.

    Returns:
        ``[B, height, width]`` bool.
    """
    small = F.interpolate(mask[:, None].to(torch.float32), size=(height, width))[:, 0].to(torch.bool)
    small[:, 0, 0] = False
    return small
