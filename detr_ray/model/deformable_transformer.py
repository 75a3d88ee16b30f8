"""The transformer of Deformable DETR (Zhu et al. 2020): encoder and decoder that read a pyramid of maps at few points.

Knows cells of several maps one after the other, their padding and queries with reference points; knows nothing of
images, classes or heads. Everything is batch first, with post-norm layers.

Letters: ``B`` images, ``S`` cells of all maps, ``L`` maps, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from detr_ray.architectures import published_values
from detr_ray.model.attention import MultiheadAttention
from detr_ray.model.deformable_attention import DeformableAttention
from detr_ray.model.encoder_layers import EncoderLayers
from detr_ray.model.feed_forward import FeedForward
from detr_ray.model.pyramid import Pyramid

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig


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
        """Cells ``[B, S, dim]`` with references ``[B, S, L, 2]`` -> cells; ``pyramid.cells`` is not used."""
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
            objects: ``[B, Q, dim]``, the query vectors after the layers before.
            query_positions: ``[B, Q, dim]``.
            references: ``[B, Q, L, 2 or 4]``, reference points or boxes in each map.
            memory: the encoder's cells.
            allowed: ``[Q, Q]`` bool, True where a query may attend to another one; None: everywhere.

        Returns:
            ``[B, Q, dim]``.
        """
        placed = objects + query_positions
        objects = self.norm2(objects + self.dropout(self.self_attn(placed, placed, objects, allowed)))
        read = self.cross_attn(objects + query_positions, references, memory.cells, memory.sizes, memory.padding)
        objects = self.norm1(objects + self.dropout(read))
        out: Tensor = self.norm3(objects + self.dropout(self.feed_forward(objects)))
        return out


class DeformableEncoder(EncoderLayers):
    """Encoder layers one after the other."""

    def forward(self, pyramid: Pyramid) -> Tensor:
        """The encoded cells ``[B, S, dim]``."""
        references = pyramid.in_each_map(pyramid.centres()).expand(pyramid.cells.shape[0], -1, -1, -1)
        return self.encoded(pyramid.cells, pyramid, references)


class DeformableDecoder(nn.Module):
    """Decoder layers. The model calls them one by one, because it updates the references in between.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: list[DeformableDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


@dataclass(frozen=True)
class TransformerSizes:
    """The sizes of a transformer over a pyramid.

    Attributes:
        dim: length of the vectors.
        num_heads: attention heads.
        num_levels: maps.
        encoder_points: points that a head of the encoder reads in each map.
        decoder_points: the same of the decoder.
        dim_feedforward: hidden width of the feed-forward networks.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers, at least 1.
        dropout: share dropped in training.
    """

    dim: int
    num_heads: int
    num_levels: int
    encoder_points: int
    decoder_points: int
    dim_feedforward: int
    encoder_layers: int
    decoder_layers: int
    dropout: float

    @classmethod
    def from_config(cls, cfg_model: ModelConfig) -> Self:
        """Those of a config's ``model`` section."""
        values = published_values(cfg_model)
        return cls(
            cfg_model.hidden_dim,
            cfg_model.num_heads,
            values["num_feature_levels"],
            values["encoder_points"],
            values["decoder_points"],
            cfg_model.dim_feedforward,
            cfg_model.encoder_layers,
            cfg_model.decoder_layers,
            cfg_model.dropout,
        )


class PyramidTransformer(nn.Module):
    """Encoder and decoder over a pyramid, and a vector for each of its maps. Subclasses add what makes the queries.

    Args:
        sizes: its sizes. decoder: makes the decoder of its layers.
    """

    def __init__(
        self,
        sizes: TransformerSizes,
        decoder: Callable[[list[DeformableDecoderLayer]], DeformableDecoder] = DeformableDecoder,
    ) -> None:
        super().__init__()
        if sizes.decoder_layers < 1:
            raise ValueError(f"the decoder needs at least one layer, not {sizes.decoder_layers}")
        of_all = (sizes.dim, sizes.num_heads, sizes.num_levels)
        of_encoder = (*of_all, sizes.encoder_points, sizes.dim_feedforward, sizes.dropout)
        of_decoder = (*of_all, sizes.decoder_points, sizes.dim_feedforward, sizes.dropout)
        self.encoder = DeformableEncoder([DeformableEncoderLayer(*of_encoder) for _ in range(sizes.encoder_layers)])
        self.decoder = decoder([DeformableDecoderLayer(*of_decoder) for _ in range(sizes.decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(sizes.num_levels, sizes.dim))

    def reset_parameters(self) -> None:
        """Initialises all parameters that have been added so far."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)


class DeformableTransformer(PyramidTransformer):
    """The transformer of Deformable DETR.

    Args:
        sizes: what it is made of.
        two_stage: queries are made of the encoder's cells instead of learned.
    """

    def __init__(self, sizes: TransformerSizes, two_stage: bool) -> None:
        super().__init__(sizes)
        dim = sizes.dim
        if two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)
            nn.init.zeros_(self.reference_points.bias)
        self.reset_parameters()
