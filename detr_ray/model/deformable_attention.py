"""Multi-scale deformable attention (Zhu et al. 2020, section 4.1) in plain torch.

Every query reads a few points of each feature map, at places and with weights that it computes itself. Reading the
points is written twice: `sample_bag` is the fast one, `sample_grid` the one that exporters understand and that can be
differentiated twice. Knows sequences of cells with the sizes of their maps; knows nothing of images or layers.

Letters: ``B`` images, ``S`` cells of all maps one after the other, ``Q`` queries, ``M`` heads, ``D`` channels of a
head, ``L`` maps, ``P`` points that a head reads in each map.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MapSizes = Sequence[tuple[int, int]]
"""Height and width in cells of each feature map. Plain numbers: reading them from a tensor would wait for the device.
"""

Sampler = Callable[[Tensor, MapSizes, Tensor, Tensor], Tensor]
"""``(value [B, S, M, D], sizes, locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P]) -> [B, Q, M * D]``.

Locations are (x, y) in 0..1 of a map; the centre of its first cell is half a cell from 0. Between four cells values are
interpolated; outside of a map they are zero.
"""

_GATHERED = 1 << 21
"""Rows that the backward pass of `sample_bag` gathers at a time where there is no sparse product (GPUs)."""


def sample_grid(value: Tensor, sizes: MapSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Reads the points map by map with ``grid_sample``; see `Sampler`.

    Only one map's samples exist at a time in the forward pass. Slower than `sample_bag`, but made of operators that
    exporters know, and twice differentiable. ``grid_sample`` needs values and locations of one type, so values of half
    precision are converted to the type of the locations.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    by_cell = value.to(locations.dtype)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    by_head = weights.transpose(1, 2).flatten(0, 1)
    read = by_cell.new_zeros(batch * heads, channels, queries)
    first = 0
    for level, (height, width) in enumerate(sizes):
        # By slices: exporters turn a split whose sizes they do not know into a sequence of tensors, which is slow.
        cells = by_cell[:, first : first + height * width]
        first += height * width
        maps = cells.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = F.grid_sample(maps, grids[:, :, level], align_corners=False)
        read = read + torch.einsum("ncqp,nqp->ncq", samples, by_head[:, :, level])
    return read.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def sample_bag(value: Tensor, sizes: MapSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Reads the points of all maps at once, as weighted sums of cells; see `Sampler`.

    A head's output for a query is a weighted sum of ``4 * L * P`` cells: one ``embedding_bag``, which multiplies and
    adds while it reads. For the backward pass only the arguments are kept. Cannot be differentiated twice.
    """
    bordered = _with_borders(value, sizes)
    read: Tensor = _WeightedCells.apply(bordered, locations, weights, tuple(sizes))
    return read


def _with_borders(value: Tensor, sizes: MapSizes) -> Tensor:
    """The cells with zeros around each map, so that points outside need no case of their own.

    A map's cell ``(y, x)``, both from -1 on, is at ``start + (y + 1) * (width + 1) + x + 1``: one column of zeros
    serves as the right border of a row and as the left border of the next one.

    Returns:
        ``[B, sum of (height + 2) * (width + 1) + 1, M, D]``.
    """
    batch, _, heads, channels = value.shape
    parts = []
    for (height, width), cells in zip(sizes, value.split([h * w for h, w in sizes], dim=1), strict=True):
        rows = F.pad(cells.view(batch, height, width, heads * channels), (0, 0, 1, 0, 1, 1)).flatten(1, 2)
        parts += [rows, rows.new_zeros(batch, 1, heads * channels)]
    return torch.cat(parts, dim=1).view(batch, -1, heads, channels)


class _Layout(NamedTuple):
    """Numbers about the bordered maps, on a device.

    Attributes:
        extent: ``[L, P, 2]`` width and height in cells; repeated for the points, which is faster to compute with.
        stride: ``[L, P]`` int32, cells from a row to the next.
        start: ``[L, P]`` int32, place of each map's cell (0, 0).
        corners: ``[L, P, 4]`` int32, what has to be added to the upper left cell's place to reach the four cells.
    """

    extent: Tensor
    stride: Tensor
    start: Tensor
    corners: Tensor


def _layout(sizes: MapSizes, locations: Tensor) -> _Layout:
    """The layout for maps of these sizes and such locations; cached, because copying it to a GPU has to wait.

    Not cached for the fake tensors of compilers and shape inference, which must not be kept.
    """
    is_kept = type(locations) is Tensor and not torch.compiler.is_compiling()
    make = _new_layout if is_kept else _new_layout.__wrapped__
    return make(tuple(sizes), locations.shape[-2], locations.device, locations.dtype)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # tensors of that mode could not be used in training later
def _new_layout(sizes: tuple[tuple[int, int], ...], points: int, device: torch.device, dtype: torch.dtype) -> _Layout:
    starts, first = [], 0
    for height, width in sizes:
        starts.append(first + width + 2)
        first += _bordered_cells(height, width)
    corners = [[[0, 1, width + 1, width + 2]] * points for _, width in sizes]
    return _Layout(
        extent=torch.tensor([[[width, height]] * points for height, width in sizes], dtype=dtype, device=device),
        stride=torch.tensor([[width + 1] * points for _, width in sizes], dtype=torch.int32, device=device),
        start=torch.tensor([[start] * points for start in starts], dtype=torch.int32, device=device),
        corners=torch.tensor(corners, dtype=torch.int32, device=device),
    )


def _bordered_cells(height: int, width: int) -> int:
    """Cells of a map with its borders."""
    return (height + 2) * (width + 1) + 1


class _Cells(NamedTuple):
    """The four cells around each point.

    Attributes:
        first: ``[B * Q * M, L * P]`` int32, rows of the upper left cells in the flattened bordered cells
            ``[B * S' * M, D]``.
        rows: ``[B * Q * M, L * P * 4]`` int32, rows of all four.
        fractions: ``[B, Q, M, L, P, 2]``, where the point lies between the upper left cell (0) and the others (1).
        is_near: bool of the same shape, whether the point is within one cell of the map along that axis.
    """

    first: Tensor
    rows: Tensor
    fractions: Tensor
    is_near: Tensor


def _cells_around(locations: Tensor, num_cells: int, layout: _Layout) -> _Cells:
    """Finds the cells; ``num_cells`` is the number of bordered cells of an image."""
    batch, _, heads = locations.shape[:3]
    device = locations.device
    # In place where it can be: these tensors are large, and new memory for each takes longer than the arithmetic.
    places = (locations * layout.extent).sub_(0.5)
    # Points beyond the border are moved onto it: both give zero.
    near = places.clamp(min=-1.0)
    torch.minimum(near, layout.extent, out=near)
    is_near = near == places
    corner = torch.minimum(torch.floor(near, out=places), layout.extent - 1, out=places)
    # NaN is no whole number: its cell could be anywhere in memory. What is read at the border becomes NaN by weights.
    x, y = corner.to(torch.int32).clamp_(min=-1).unbind(-1)
    images = torch.arange(batch, dtype=torch.int32, device=device).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, dtype=torch.int32, device=device).view(-1, 1, 1)
    upper_left = (y * (layout.stride * heads)).add_(x, alpha=heads)
    upper_left += (images * num_cells + layout.start) * heads + head
    rows = upper_left[..., None] + layout.corners * heads
    return _Cells(upper_left.flatten(3).flatten(0, 2), rows.flatten(3).flatten(0, 2), near.sub_(corner), is_near)


def _bilinear(fractions: Tensor) -> Tensor:
    """Interpolation weights of the four cells, ``[..., 4]``: upper left, upper right, lower left, lower right."""
    x, y = fractions.unbind(-1)
    both = x * y
    return torch.stack((1 - x - y + both, x - both, y - both, both), dim=-1)


class _WeightedCells(torch.autograd.Function):
    """Weighted sums of the cells around points; only the arguments are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, bordered: Tensor, locations: Tensor, weights: Tensor, sizes: Any) -> Tensor:
        ctx.save_for_backward(bordered, locations, weights)
        ctx.sizes = sizes
        batch, num_cells, heads, channels = bordered.shape
        cells = _cells_around(locations, num_cells, _layout(sizes, locations))
        shares = _bilinear(cells.fractions).mul_(weights[..., None]).view(cells.rows.shape)
        read = F.embedding_bag(
            cells.rows, bordered.reshape(-1, channels), mode="sum", per_sample_weights=shares.to(bordered.dtype)
        )
        return read.view(batch, -1, heads * channels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bordered, locations, weights = ctx.saved_tensors
        channels = bordered.shape[-1]
        layout = _layout(ctx.sizes, locations)
        cells = _cells_around(locations, bordered.shape[1], layout)
        by_bag = gradient.reshape(-1, channels)
        bilinear = _bilinear(cells.fractions)

        of_bordered = None
        if ctx.needs_input_grad[0]:
            shares = (bilinear * weights[..., None]).view(-1, 4)
            of_bordered = _scattered(cells.first, shares.to(by_bag.dtype), by_bag, bordered.shape, ctx.sizes)

        of_shares = _products(bordered.view(-1, channels), cells.rows, by_bag).to(weights.dtype).view(bilinear.shape)
        of_weights = bilinear.mul_(of_shares).sum(-1)
        x, y = cells.fractions.unbind(-1)
        upper_left, upper_right, lower_left, lower_right = of_shares.unbind(-1)
        upper, lower = upper_right - upper_left, lower_right - lower_left
        of_both = lower - upper
        of_x = upper.addcmul_(y, of_both)
        of_y = (lower_left - upper_left).addcmul_(x, of_both)
        of_places = torch.stack((of_x, of_y), dim=-1).mul_(weights[..., None])
        return of_bordered, of_places.mul_(cells.is_near).mul_(layout.extent), of_weights, None


def _products(table: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of ``vectors [N, D]`` with the rows ``[N, K]`` of ``table [R, D]``, as ``[N, K]``.

    On CPUs this is the product of two matrices at some places, which torch computes without gathering the rows (in
    fp32 or fp64). Elsewhere the rows are gathered in pieces: all together would be as large as what the forward pass
    avoids.
    """
    number, of_each = rows.shape
    if table.device.type == "cpu":
        exact = torch.promote_types(table.dtype, torch.float32)
        starts = torch.arange(0, rows.numel() + 1, of_each, dtype=rows.dtype)
        places = _sparse_rows(starts, rows.flatten(), table.new_zeros(rows.numel(), dtype=exact), (number, len(table)))
        found = torch.sparse.sampled_addmm(places, vectors.to(exact), table.to(exact).t(), beta=0.0)
        return found.values().view(rows.shape)
    products = vectors.new_empty(rows.shape)
    step = max(1, _GATHERED // of_each)
    for some, vector, out in zip(rows.split(step), vectors.split(step), products.split(step), strict=True):
        gathered = table.index_select(0, some.flatten()).view(*some.shape, -1)
        torch.sum(gathered.mul_(vector[:, None]), dim=-1, out=out)
    return products


def _sparse_rows(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse matrix, row by row; the same column may stand in a row more than once."""
    _warn_of_beta()
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


@cache
def _warn_of_beta() -> None:
    """Has torch say here, unheard, that such tensors are in beta, which it says once: users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _scattered(first: Tensor, shares: Tensor, vectors: Tensor, shape: Sequence[int], sizes: MapSizes) -> Tensor:
    """Adds ``shares [N * K, 4]`` times ``vectors [N, D]`` to the four cells whose upper left ones are ``first [N, K]``.

    The points are sorted by their upper left cell. Then what each cell gets from points for which it is the upper
    left one is a weighted sum, and so for the other three corners, whose sums are then moved to where they belong.
    Deterministic, and on CPUs several times faster than adding one after the other.

    Returns:
        A table of zeros of this shape, ``[B, S', M, D]``, with what was added.
    """
    batch, _, heads, channels = shape
    ordered, order = first.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(math.prod(shape[:3]), dtype=ordered.dtype, device=first.device))
    bags = order // first.shape[1]
    by_corner = shares.index_select(0, order).t().contiguous()
    upper_left, *others = (
        F.embedding_bag(bags, vectors, starts, mode="sum", per_sample_weights=corner).view(batch, -1, heads, channels)
        for corner in by_corner
    )
    begin = 0
    for height, width in sizes:
        end = begin + _bordered_cells(height, width)
        for part, shift in zip(others, (1, width + 1, width + 2), strict=True):
            upper_left[:, begin + shift : end] += part[:, begin : end - shift]
        begin = end
    return upper_left


class DeformableAttention(nn.Module):
    """Attention of queries to a few points around their reference points, in several feature maps.

    Args:
        dim: length of the vectors; a multiple of ``num_heads``.
        num_heads: heads, each with points of its own.
        num_levels: feature maps.
        num_points: points that each head reads in each map.

    Attributes:
        sampler: how points are read: `sample_bag` or `sample_grid`.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads: {dim} is none of {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampler: Sampler = sample_bag
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * points)
        self.attention_weights = nn.Linear(dim, points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First weights: all points have equal weights; those of each head lie in one direction, a cell apart."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        rays = torch.stack((angles.cos(), angles.sin()), dim=-1)
        rays = rays / rays.abs().amax(-1, keepdim=True)  # onto the border of a square
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = rays[:, None, None] * distances[:, None]
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, references: Tensor, memory: Tensor, sizes: MapSizes, padding: Tensor | None
    ) -> Tensor:
        """Reads the memory around the references.

        Under autocast, locations and weights of the points are computed in the parameters' own precision: in bf16, a
        location on a large map would be wrong by whole cells.

        Args:
            query: ``[B, Q, dim]``.
            references: ``[B, Q, L, 2]`` (x, y) in 0..1 of each padded map, or ``[B, Q, L, 4]`` (x, y, w, h): then
                points are placed in units of the box instead of cells.
            memory: ``[B, S, dim]``, the cells of all maps.
            sizes: height and width of each map.
            padding: ``[B, S]`` bool, True on cells that count as zero; None where nothing is padded.

        Returns:
            ``[B, Q, dim]``.
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.view(*value.shape[:2], self.num_heads, -1)
        with torch.autocast(query.device.type, enabled=False):
            locations, weights = self.points(query, references, sizes)
            read = self.sampler(value, sizes, locations, weights)
        out: Tensor = self.output_proj(read)
        return out

    def points(self, query: Tensor, references: Tensor, sizes: MapSizes) -> tuple[Tensor, Tensor]:
        """The points that each query reads, and their weights; computed in the parameters' own precision.

        Args:
            query: as in `forward`.
            references: as in `forward`.
            sizes: as in `forward`.

        Returns:
            Locations ``[B, Q, M, L, P, 2]``, (x, y) in 0..1 of each padded map; and weights ``[B, Q, M, L, P]``, which
            sum to 1 over ``L`` and ``P``.
        """
        points = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        exact = query.to(self.sampling_offsets.weight.dtype)
        offsets = self.sampling_offsets(exact).view(*points, 2)
        weights = self.attention_weights(exact).view(*points[:3], -1).softmax(-1).view(points)
        return self._locations(references.to(exact.dtype), offsets, sizes), weights

    def _locations(self, references: Tensor, offsets: Tensor, sizes: MapSizes) -> Tensor:
        """Places of the points, ``[B, Q, M, L, P, 2]``."""
        centres = references[:, :, None, :, None, :2]
        if references.shape[-1] == 2:
            return centres + offsets / _layout(sizes, offsets).extent
        return centres + offsets * (references[:, :, None, :, None, 2:] * (0.5 / self.num_points))
