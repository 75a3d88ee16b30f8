"""The usual fallback of multi-scale deformable attention: samples of all maps stacked, weighted, summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_stacked(value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Reads ``value [B, S, M, D]`` at ``locations [B, Q, M, L, P, 2]`` with ``weights``, as ``[B, Q, M * D]``."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype)
    samples = []
    for level, cells in enumerate(value.split([height * width for height, width in sizes], dim=1)):
        maps = cells.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *sizes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    share = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1).to(value.dtype)
    read = (torch.stack(samples, dim=-2).flatten(-2) * share).sum(-1)
    return read.view(batch, heads * channels, queries).transpose(1, 2).contiguous()
