"""Position encodings: vectors for the cells of a feature map, which are added to queries and keys of attention.

Knows padding masks and feature map sizes; knows nothing of images, backbones or attention.

Both encodings give ``[B or 1, h, w, hidden_dim]``: batch 1 stands for every image of a batch without padding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from detr_ray.architectures import published_values

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

LEARNED_LIMIT = 50
"""Rows and columns that the learned encoding has a vector for (the published layout)."""


def waves(coordinate: Tensor, channels: int, temperature: float) -> Tensor:
    """Sine and cosine of ``[...]`` at ``channels / 2`` frequencies, interleaved: ``[..., channels]``."""
    pair = torch.arange(0, channels, 2, device=coordinate.device, dtype=torch.float32)
    wavelength = temperature ** (pair / channels)
    angle = coordinate[..., None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Sines and cosines of a cell's position in the unpadded image; has no tensors.

    A cell's row is counted over the unpadded rows of its column, scaled to 0..2*pi, and read at ``hidden_dim / 4``
    frequencies; likewise its column. The first half of the channels encodes the row, the second the column.

    Args:
        hidden_dim: length of the vectors; a multiple of 4.
        temperature: the longest wavelength, in units of the scaled coordinate.
        offset: added to a cell's number, which counts from 1: -0.5 for its middle.
    """

    HALVES = ("rows", "columns")
    """What each half of the channels encodes."""

    def __init__(self, hidden_dim: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        super().__init__()
        if hidden_dim % 4:
            raise ValueError(f"the sine position embedding needs a hidden_dim that 4 divides, not {hidden_dim}")
        self.axis_dim = hidden_dim // 2
        self.temperature, self.offset = temperature, offset
        self.scale = 2 * math.pi
        self.eps = 1e-6

    @classmethod
    def from_config(cls, cfg_model: ModelConfig) -> Self:
        """The encoding of a config's ``model`` section, whose architecture has its own temperature and offset."""
        values = published_values(cfg_model)
        return cls(cfg_model.hidden_dim, values["position_temperature"], values["position_offset"])

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Encodes the cells of a feature map.

        Args:
            features: ``[B, C, h, w]``; only its size and device matter.
            mask: ``[B, h, w]`` bool, True on padding; None where nothing is padded.

        Returns:
            ``[B, h, w, hidden_dim]`` float32, or ``[1, h, w, hidden_dim]`` without a mask.
        """
        height, width = features.shape[-2:]
        if mask is None:
            rows = torch.arange(1, height + 1, device=features.device, dtype=torch.float32).view(1, height, 1)
            columns = torch.arange(1, width + 1, device=features.device, dtype=torch.float32).view(1, 1, width)
        else:
            valid = ~mask
            rows = valid.cumsum(1, dtype=torch.float32)
            columns = valid.cumsum(2, dtype=torch.float32)
        rows = (rows + self.offset) / (rows[:, -1:, :] + self.eps) * self.scale
        columns = (columns + self.offset) / (columns[:, :, -1:] + self.eps) * self.scale
        by_row, by_column = (waves(axis, self.axis_dim, self.temperature) for axis in (rows, columns))
        batch = by_row.shape[0]
        return torch.cat(
            (
                by_row.expand(batch, height, width, self.axis_dim),
                by_column.expand(batch, height, width, self.axis_dim),
            ),
            dim=-1,
        )


class LearnedPositionEncoding(nn.Module):
    """One trained vector for each row and each column, at most ``LEARNED_LIMIT``; independent of padding.

    Args:
        hidden_dim: length of the vectors; even. The first half encodes the column, the second the row.
    """

    HALVES = ("columns", "rows")
    """What each half of the channels encodes."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        if hidden_dim % 2:
            raise ValueError(f"the learned position embedding needs an even hidden_dim, not {hidden_dim}")
        self.row_embed = nn.Embedding(LEARNED_LIMIT, hidden_dim // 2)
        self.col_embed = nn.Embedding(LEARNED_LIMIT, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors of the cells of ``[B, C, h, w]``, as ``[1, h, w, hidden_dim]``; ``mask`` is not used.

        Raises:
            ValueError: the feature map has more rows or columns than there are vectors.
        """
        height, width = features.shape[-2:]
        if height > LEARNED_LIMIT or width > LEARNED_LIMIT:
            raise ValueError(
                f"the learned position embedding reaches {LEARNED_LIMIT} rows and columns, the feature map is "
                f"{height} x {width}: use smaller images, a larger model.backbone_stride, "
                "or model.position_embedding=sine"
            )
        by_row = self.row_embed.weight[:height, None].expand(height, width, -1)
        by_column = self.col_embed.weight[None, :width].expand(height, width, -1)
        return torch.cat((by_column, by_row), dim=-1)[None]
