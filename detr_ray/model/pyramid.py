"""A pyramid: feature maps of several resolutions as one sequence of cells, in the transformer's vector length.

Knows feature maps, their padding and position encodings; knows nothing of attention, queries or classes.

Letters: ``B`` images, ``S`` cells of all maps, ``L`` maps, ``Q`` queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detr_ray.model.deformable_attention import MapSizes
from detr_ray.model.features import FeatureLevel, blank_padding, is_misread_in_bf16, shrink_mask


@dataclass(frozen=True)
class Pyramid:
    """The cells of several maps, the one with the most cells first, row by row.

    Attributes:
        cells: ``[B, S, dim]``.
        positions: ``[B or 1, S, dim]``.
        padding: ``[B, S]`` bool, True on padding; None where nothing is padded.
        sizes: height and width of each map.
        valid_ratios: ``[B or 1, L, 2]``, share of each map's (width, height) without padding.
    """

    cells: Tensor
    positions: Tensor
    padding: Tensor | None
    sizes: MapSizes
    valid_ratios: Tensor

    def with_cells(self, cells: Tensor) -> Pyramid:
        """The pyramid with other cells, converted to their precision."""
        return replace(self, cells=cells.to(self.cells.dtype))

    def centres(self) -> Tensor:
        """Centres of all cells, ``[B or 1, S, 2]`` (x, y) in 0..1 of the unpadded image; beyond 1 in the padding."""
        return torch.cat(
            [_centres(height, width, self.valid_ratios[:, level]) for level, (height, width) in enumerate(self.sizes)],
            dim=1,
        )

    def in_each_map(self, places: Tensor) -> Tensor:
        """Points or boxes ``[B, Q, 2 or 4]`` of the unpadded image as ``[B, Q, L, 2 or 4]`` of each padded map."""
        ratios = self.valid_ratios if places.shape[-1] == 2 else self.valid_ratios.repeat(1, 1, 2)
        return places[:, :, None] * ratios[:, None]


def _centres(height: int, width: int, valid_ratios: Tensor) -> Tensor:
    """Centres of the cells of a map, ``[B, height * width, 2]`` (x, y), from its ``valid_ratios [B, 2]``.

    Divided by whole numbers of cells: with 50 rows the first one lies at 0.01, where proposals begin, and the last bit
    of a ratio would decide whether it proposes.
    """
    columns, rows = (
        (torch.arange(cells, device=valid_ratios.device, dtype=torch.float32) + 0.5)
        / (valid_ratios[:, axis, None] * cells).round()
        for axis, cells in enumerate((width, height))
    )
    return torch.stack(
        (columns[:, None].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)), dim=-1
    ).flatten(1, 2)


def valid_ratios(paddings: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Share of each map's (width, height) without padding, ``[B or 1, L, 2]``, from masks ``[B, h, w]``.

    Padding is at the right and at the bottom, so the first row and the first column are enough.
    """
    ratios = []
    for padding in paddings:
        if padding is None:
            return torch.ones(1, len(paddings), 2, device=device)
        valid = ~padding
        ratios.append(torch.stack((valid[:, 0].float().mean(1), valid[:, :, 0].float().mean(1)), dim=-1))
    return torch.stack(ratios, dim=1)


def strides_for(num_levels: int, finest: int, coarsest: int) -> tuple[int, ...]:
    """Strides of the maps that a pyramid takes from its backbone: the coarsest ones, at most as many as it has levels.

    Args:
        num_levels: maps of the pyramid.
        finest: smallest stride that is taken.
        coarsest: stride of the backbone's last map.
    """
    strides = (4, 8, 16, 32)
    return tuple(stride for stride in strides if finest <= stride <= coarsest)[-num_levels:]


class InputProjection(nn.Sequential):
    """A convolution to the transformer's vector length, and group norm.

    As published, padding counts in the norm's mean and deviation, and the convolution reads what the backbone made of
    it: an image gives other cells alone than padded in a batch. A model that was trained on much padding finds worse
    boxes without it.

    Args:
        convolution: to ``dim`` channels.
        dim: the transformer's vector length.
        ignore_padding: leave padding out of both.
    """

    def __init__(self, convolution: nn.Conv2d, dim: int, ignore_padding: bool) -> None:
        # Two channels a group at least: a map of one cell would be all zeros, and alone in a batch torch refuses it.
        super().__init__(convolution, nn.GroupNorm(math.gcd(min(32, dim // 2), dim), dim))
        self.ignore_padding = ignore_padding
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)

    def forward(self, source: Tensor, source_padding: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, dim, h', w']``.

        Args:
            source: the map.
            source_padding: ``[B, h, w]`` bool, True on padding; None where nothing is padded.
            padding: the same of the result.
        """
        norm = self[1]
        assert isinstance(norm, nn.GroupNorm)
        projected: Tensor
        if padding is None or source_padding is None or not self.ignore_padding:
            projected = norm(self._convolved(source))
        else:
            projected = _norm_without(padding, self._convolved(blank_padding(source, source_padding)), norm)
        return projected

    def _convolved(self, source: Tensor) -> Tensor:
        convolution = self[0]
        assert isinstance(convolution, nn.Conv2d)
        if not is_misread_in_bf16(source, convolution):
            return convolution(source)
        with torch.autocast("cpu", enabled=False):
            return convolution(source.float())


def _norm_without(padding: Tensor, features: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of ``[B, C, h, w]`` whose mean and deviation are those of the cells without padding."""
    groups = features.float().unflatten(1, (norm.num_groups, -1))
    valid = ~padding[:, None, None]
    axes = (2, 3, 4)
    count = valid.sum(axes, keepdim=True).clamp(min=1) * groups.shape[2]
    centred = groups - (groups * valid).sum(axes, keepdim=True) / count
    variance = (centred.square() * valid).sum(axes, keepdim=True) / count
    normal = (centred * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


def input_projections(
    channels: Sequence[int], num_levels: int, dim: int, *, ignore_padding: bool = False
) -> nn.ModuleList:
    """Projections to the transformer's vector length: one for each map, the backbone's and further coarser ones.

    The first coarser map is made from the backbone's last map, each other one from the map before.

    Args:
        channels: of the backbone's maps.
        num_levels: maps of the pyramid, at least as many.
        dim: the transformer's vector length.
        ignore_padding: see `InputProjection`.
    """
    projections = nn.ModuleList()
    for level in range(num_levels):
        if level < len(channels):
            convolution = nn.Conv2d(channels[level], dim, kernel_size=1)
        else:
            source = channels[-1] if level == len(channels) else dim
            convolution = nn.Conv2d(source, dim, kernel_size=3, stride=2, padding=1)
        projections.append(InputProjection(convolution, dim, ignore_padding))
    return projections


def _halved(padding: Tensor | None, mask: Tensor, source: Tensor, project: nn.Module) -> Tensor:
    """Padding ``[B, h', w']`` of a map of half the resolution of ``source``, whose padding is given.

    As published it is read off the images' ``mask``, at places that are those of the cells only where the padded sides
    are divisible by the stride: an image may have a cell more in a batch than alone.
    """
    if isinstance(project, InputProjection) and project.ignore_padding and padding is not None:
        return padding[:, ::2, ::2]
    return shrink_mask(mask, (source.shape[-2] + 1) // 2, (source.shape[-1] + 1) // 2)


def build_pyramid(
    levels: Sequence[FeatureLevel],
    mask: Tensor | None,
    projections: nn.ModuleList,
    position_encoding: nn.Module,
    level_embed: Tensor,
) -> Pyramid:
    """The projected cells of all levels, one after the other.

    Args:
        levels: the backbone's maps.
        mask: ``[B, H, W]`` bool at the images' resolution, True on padding; None where nothing is padded.
        projections: as made by `input_projections`; one for each map of the pyramid.
        position_encoding: encodes the positions of a map's cells, such as `SinePositionEncoding`.
        level_embed: ``[L, dim]``, added to the positions of each map's cells. The pyramid gets its precision.
    """
    precision = level_embed.dtype
    cells, positions, paddings, sizes = [], [], [], []
    for number, project in enumerate(projections):
        if number < len(levels):
            source, padding, _ = levels[number]
            features = project(source, padding, padding).to(precision)
        else:
            if number > len(levels):
                source = features
            source_padding = padding
            if mask is not None:
                padding = _halved(source_padding, mask, source, project)
            features = project(source, source_padding, padding).to(precision)
        cells.append(features.flatten(2).transpose(1, 2))
        positions.append(position_encoding(features, padding).flatten(1, 2).to(precision) + level_embed[number])
        paddings.append(padding)
        sizes.append((features.shape[-2], features.shape[-1]))
    flat = [padding.flatten(1) for padding in paddings if padding is not None]
    return Pyramid(
        cells=torch.cat(cells, dim=1),
        positions=torch.cat(positions, dim=1),
        padding=torch.cat(flat, dim=1) if flat else None,
        sizes=tuple(sizes),
        valid_ratios=valid_ratios(paddings, cells[0].device),
    )
