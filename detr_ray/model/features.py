"""The output of backbones: feature maps with their padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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
        pixels: statistics for the normalisation of images.
        layers: prefix of the parameter names of each layer, from the first to the last; for layer-wise learning rates.
        ignore_padding: the features of an image do not depend on its padding, nor does the number of its cells.
    """

    layers: tuple[tuple[str, ...], ...] = ()
    ignore_padding = False
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    pixels: PixelStatistics

    def maps(self, images: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        """The feature maps of ``[B, 3, H, W]`` normalised images with ``mask`` of their padding, or None."""
        raise NotImplementedError

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[FeatureLevel, ...]:
        """Feature maps, each with the mask at its resolution.

        Args:
            images: ``[B, 3, H, W]`` normalised.
            mask: ``[B, H, W]`` bool, True on padding; None where nothing is padded.
        """
        return tuple(
            FeatureLevel(features, self._shrunk(mask, features, stride), stride)
            for features, stride in zip(self.maps(images, mask), self.strides, strict=True)
        )

    def _shrunk(self, mask: Tensor | None, features: Tensor, stride: int) -> Tensor | None:
        if mask is None or not self.ignore_padding:
            return None if mask is None else shrink_mask(mask, *features.shape[-2:])
        return mask[:, ::stride, ::stride]


def is_misread_in_bf16(features: Tensor, convolution: nn.Conv2d) -> bool:
    """Whether torch 2.14 gives wrong values on CPUs with AMX: strided convolutions of maps one or two columns wide.

    The coarsest maps of small images are that narrow. They are tiny, so fp32 costs nothing.

    Args:
        features: ``[B, C, h, w]``, which ``convolution`` is to read.
        convolution: is run under autocast.
    """
    is_strided = convolution.stride != (1, 1) and convolution.kernel_size != (1, 1)
    on_cpu = features.device.type == "cpu"
    return is_strided and on_cpu and torch.is_autocast_enabled("cpu") and features.shape[-1] <= 2


def blank_padding(features: Tensor, padding: Tensor | None) -> Tensor:
    """Features with 0 on padding.

    A product and no `masked_fill`, which takes six times as long for maps that are stored channels last and gives
    maps that are not, so that all later layers are slower too.

    Args:
        features: ``[B, C, h, w]``, finite.
        padding: ``[B, h, w]`` bool, True on padding; None where nothing is padded.
    """
    return features if padding is None else features * (~padding)[:, None].to(features.dtype)


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Reads a mask at the corner pixel of each cell (nearest interpolation).

    The first cell always counts as valid: attention over no cell at all gives NaN, and images are padded only at the
    right and at the bottom.

    Args:
        mask: ``[B, H, W]`` bool, True on padding.
        height: rows of cells.
        width: columns of cells.

    Returns:
        ``[B, height, width]`` bool.
    """
    small = mask.index_select(1, _corner_pixels(mask.shape[1], height, mask.device))
    small = small.index_select(2, _corner_pixels(mask.shape[2], width, mask.device))
    is_first = torch.arange(height * width, device=mask.device).view(height, width) == 0
    return small & ~is_first


def _corner_pixels(pixels: int, cells: int, device: torch.device) -> Tensor:
    """The first pixel of each cell along an axis, int64: exactly the pixel that ``F.interpolate`` reads.

    Written out because runtimes of exported models round differently in their own interpolation.
    """
    ratio = torch.full((), pixels, dtype=torch.float32, device=device) / cells
    return (torch.arange(cells, device=device) * ratio).floor().to(torch.int64).clamp(max=pixels - 1)
