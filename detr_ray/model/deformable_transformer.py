"""The transformer of Deformable DETR (Zhu et al. 2020): encoder and decoder that read a pyramid of maps at few points.

Knows cells of several maps one after the other, their padding and queries with reference points; knows nothing of
images, classes or heads. Everything is batch first, and normalised behind each branch.

Letters: ``B`` images, ``S`` cells of all maps, ``L`` maps, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_ray.model.attention import MultiheadAttention
from detr_ray.model.deformable_attention import DeformableAttention, MapSizes


@dataclass(frozen=True)
class Pyramid:
    """The cells of several maps, the one with the most cells first, row by row.

    Attributes:
        cells: ``[B, S, dim]``.
        positions: ``[B or 1, S, dim]``.
        padding: ``[B, S]`` bool, True on padding; None where nothing is padded.
        sizes: height and width of each map.
        valid_ratios: ``[B or 1, L, 2]``, share of each map's (width, height) that is no padding.
    """

    cells: Tensor
    positions: Tensor
    padding: Tensor | None
    sizes: MapSizes
    valid_ratios: Tensor

    def centres(self) -> Tensor:
        """Centres of all cells, ``[B or 1, S, 2]`` (x, y) in 0..1 of the unpadded image; beyond 1 in the padding."""
        return torch.cat(
            [
                _cell_middles(height, width, self.cells.device) / self.valid_ratios[:, level, None]
                for level, (height, width) in enumerate(self.sizes)
            ],
            dim=1,
        )

    def in_each_map(self, places: Tensor) -> Tensor:
        """Points or boxes ``[B, Q, 2 or 4]`` of the unpadded image as ``[B, Q, L, 2 or 4]`` of each padded map."""
        ratios = self.valid_ratios if places.shape[-1] == 2 else self.valid_ratios.repeat(1, 1, 2)
        return places[:, :, None] * ratios[:, None]


def _cell_middles(height: int, width: int, device: torch.device) -> Tensor:
    """Middles of the cells of a map, ``[height * width, 2]`` (x, y) in 0..1 of the map, row by row."""
    y, x = torch.meshgrid(
        (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height,
        (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def valid_ratios(paddings: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Share of each map's (width, height) that is no padding, ``[B or 1, L, 2]``, from masks ``[B, h, w]``.

    Padding is at the right and at the bottom, so that the first row and the first column say it.
    """
    ratios = []
    for padding in paddings:
        if padding is None:
            return torch.ones(1, len(paddings), 2, device=device)
        valid = ~padding
        ratios.append(torch.stack((valid[:, 0].float().mean(1), valid[:, :, 0].float().mean(1)), dim=-1))
    return torch.stack(ratios, dim=1)


class FeedForward(nn.Module):
    """What encoder and decoder layers share: a perceptron behind the attention, and dropout."""

    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        """The perceptron's output, not added to anything yet."""
        out: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return out


class DeformableEncoderLayer(FeedForward):
    """Deformable attention of cells to the cells around them in all maps, then a feed-forward network.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        num_levels: maps.
        num_points: points that a head reads in each map.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: share dropped from hidden units and each branch's output.
    """

    def __init__(
        self, dim: int, num_heads: int, num_levels: int, num_points: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, pyramid: Pyramid, references: Tensor) -> Tensor:
        """Cells ``[B, S, dim]`` with references ``[B, S, L, 2]`` -> cells; ``pyramid.cells`` play no part."""
        read = self.self_attn(cells + pyramid.positions, references, cells, pyramid.sizes, pyramid.padding)
        cells = self.norm1(cells + self.dropout(read))
        out: Tensor = self.norm2(cells + self.dropout(self.feed_forward(cells)))
        return out


class DeformableDecoderLayer(FeedForward):
    """Self-attention between queries, deformable attention to the cells, then a feed-forward network.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        num_levels: maps.
        num_points: points that a head reads in each map.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: share dropped from self-attention weights, hidden units and each branch's output.
    """

    def __init__(
        self, dim: int, num_heads: int, num_levels: int, num_points: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, objects: Tensor, query_positions: Tensor, references: Tensor, memory: Pyramid, allowed: Tensor | None
    ) -> Tensor:
        """One layer.

        Args:
            objects: ``[B, Q, dim]``, what is known of each query's object so far.
            query_positions: ``[B, Q, dim]``.
            references: ``[B, Q, L, 2 or 4]``, where to look in each map.
            memory: the encoder's cells.
            allowed: ``[Q, Q]`` bool, True where a query may see another one; None: everywhere.

        Returns:
            ``[B, Q, dim]``.
        """
        placed = objects + query_positions
        objects = self.norm2(objects + self.dropout(self.self_attn(placed, placed, objects, allowed)))
        read = self.cross_attn(objects + query_positions, references, memory.cells, memory.sizes, memory.padding)
        objects = self.norm1(objects + self.dropout(read))
        out: Tensor = self.norm3(objects + self.dropout(self.feed_forward(objects)))
        return out


class DeformableEncoder(nn.Module):
    """Encoder layers one after the other.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: list[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, pyramid: Pyramid) -> Tensor:
        """The encoded cells ``[B, S, dim]``."""
        references = pyramid.in_each_map(pyramid.centres()).expand(len(pyramid.cells), -1, -1, -1)
        cells = pyramid.cells
        for layer in self.layers:
            cells = layer(cells, pyramid, references)
        return cells


class DeformableDecoder(nn.Module):
    """Decoder layers. Between them the model moves the references, so that it calls them one by one.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: list[DeformableDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeformableTransformer(nn.Module):
    """Encoder and decoder with their parameters' init, and what makes queries out of cells.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        num_levels: maps.
        encoder_points: points that a head of the encoder reads in each map.
        decoder_points: the same of the decoder.
        dim_feedforward: hidden width of the feed-forward networks.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers, at least 1.
        dropout: share dropped in training.
        two_stage: queries are made of the encoder's cells instead of learned.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        encoder_points: int,
        decoder_points: int,
        dim_feedforward: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float,
        two_stage: bool,
    ) -> None:
        super().__init__()
        if decoder_layers < 1:
            raise ValueError(f"the decoder needs at least one layer, not {decoder_layers}")
        of_encoder = (dim, num_heads, num_levels, encoder_points, dim_feedforward, dropout)
        of_decoder = (dim, num_heads, num_levels, decoder_points, dim_feedforward, dropout)
        self.encoder = DeformableEncoder([DeformableEncoderLayer(*of_encoder) for _ in range(encoder_layers)])
        self.decoder = DeformableDecoder([DeformableDecoderLayer(*of_decoder) for _ in range(decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        if two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)
