"""DETR's transformer: an encoder over the cells of a feature map, a decoder over object queries.

Knows sequences of vectors, their position vectors and which cells are padding; knows nothing of images or boxes.
Position vectors are added to queries and keys at every attention, never to values. Everything is batch first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_ray.model.attention import MultiheadAttention
from detr_ray.model.encoder_layers import EncoderLayers
from detr_ray.model.feed_forward import FeedForward


class EncoderLayer(FeedForward):
    """Self-attention between cells, then a feed-forward network.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: share dropped from attention weights, hidden units and each branch's output.
        pre_norm: normalise what goes into a branch, instead of the sum that comes out.
    """

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, cells: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        """One layer: cells ``[B, S, dim]``, positions ``[B or 1, S, dim]``, allowed ``[B, 1, 1, S]`` -> cells."""
        if self.pre_norm:
            cells = cells + self.dropout(self._attend(self.norm1(cells), positions, allowed))
            return cells + self.dropout(self.feed_forward(self.norm2(cells)))
        cells = self.norm1(cells + self.dropout(self._attend(cells, positions, allowed)))
        out: Tensor = self.norm2(cells + self.dropout(self.feed_forward(cells)))
        return out

    def _attend(self, cells: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        placed = cells + positions
        out: Tensor = self.self_attn(placed, placed, cells, allowed)
        return out


class DecoderLayer(FeedForward):
    """Self-attention between queries, attention from queries to cells, then a feed-forward network.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: share dropped from attention weights, hidden units and each branch's output.
        pre_norm: normalise what goes into a branch, instead of the sum that comes out.
    """

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(
        self, objects: Tensor, query_positions: Tensor, placed_memory: Tensor, memory: Tensor, allowed: Tensor | None
    ) -> Tensor:
        """One layer.

        Args:
            objects: ``[B, Q, dim]``, the query vectors after the layers before.
            query_positions: ``[Q, dim]``, the learned queries.
            placed_memory: ``[B, S, dim]``, the encoder's cells with their positions added.
            memory: ``[B, S, dim]``, the encoder's cells.
            allowed: ``[B, 1, 1, S]`` bool, True on cells of the image; None where nothing is padded.

        Returns:
            ``[B, Q, dim]``.
        """
        if self.pre_norm:
            objects = objects + self.dropout(self._attend(self.norm1(objects), query_positions))
            asked = self.norm2(objects) + query_positions
            objects = objects + self.dropout(self.multihead_attn(asked, placed_memory, memory, allowed))
            return objects + self.dropout(self.feed_forward(self.norm3(objects)))
        objects = self.norm1(objects + self.dropout(self._attend(objects, query_positions)))
        asked = objects + query_positions
        objects = self.norm2(objects + self.dropout(self.multihead_attn(asked, placed_memory, memory, allowed)))
        out: Tensor = self.norm3(objects + self.dropout(self.feed_forward(objects)))
        return out

    def _attend(self, objects: Tensor, query_positions: Tensor) -> Tensor:
        placed = objects + query_positions
        out: Tensor = self.self_attn(placed, placed, objects)
        return out


class Encoder(EncoderLayers):
    """Encoder layers one after the other; with pre-norm, a last normalisation (``norm``).

    Args:
        layers: the layers.
        norm: applied to the last layer's output, or None.
    """

    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__(layers)
        self.norm = norm

    def forward(self, cells: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        """Cells ``[B, S, dim]`` -> memory ``[B, S, dim]``."""
        cells = self.encoded(cells, positions, allowed)
        return cells if self.norm is None else self.norm(cells)


class Decoder(nn.Module):
    """Decoder layers one after the other; all outputs go through one shared ``norm``.

    Args:
        layers: the layers.
        norm: the shared normalisation.
    """

    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, query_positions: Tensor, memory: Tensor, positions: Tensor, allowed: Tensor | None, every_layer: bool
    ) -> Tensor:
        """Turns the queries ``[Q, dim]`` into objects.

        Returns:
            ``[layers, B, Q, dim]``, first layer first; ``[1, B, Q, dim]``, the last alone, unless ``every_layer``.
        """
        placed_memory = memory + positions
        objects = memory.new_zeros(memory.shape[0], *query_positions.shape)
        outputs = []
        for layer in self.layers:
            objects = layer(objects, query_positions, placed_memory, memory, allowed)
            outputs.append(objects)
        out: Tensor = self.norm(torch.stack(outputs if every_layer else outputs[-1:]))
        return out


class Transformer(nn.Module):
    """Encoder and decoder, all their matrices initialised with Xavier's uniform rule.

    Args:
        dim: length of the vectors.
        num_heads: attention heads.
        dim_feedforward: hidden width of the feed-forward networks.
        encoder_layers: number of encoder layers; 0 passes the cells through.
        decoder_layers: number of decoder layers, at least 1.
        dropout: share dropped in training.
        pre_norm: normalise what goes into a branch, instead of the sum that comes out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        if decoder_layers < 1:
            raise ValueError(f"the decoder needs at least one layer, not {decoder_layers}")
        layer = (dim, num_heads, dim_feedforward, dropout, pre_norm)
        self.encoder = Encoder(
            [EncoderLayer(*layer) for _ in range(encoder_layers)], nn.LayerNorm(dim) if pre_norm else None
        )
        self.decoder = Decoder([DecoderLayer(*layer) for _ in range(decoder_layers)], nn.LayerNorm(dim))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        cells: Tensor,
        positions: Tensor,
        padding: Tensor | None,
        query_positions: Tensor,
        every_layer: bool = True,
    ) -> Tensor:
        """Computes the vectors of objects from the cells.

        Args:
            cells: ``[B, S, dim]``.
            positions: ``[B or 1, S, dim]``.
            padding: ``[B, S]`` bool, True on cells that are padding, not all of an image's; None where none is.
            query_positions: ``[Q, dim]``, the learned queries.
            every_layer: whether the output has the objects of every decoder layer, not only of the last.

        Returns:
            ``[decoder layers or 1, B, Q, dim]``.
        """
        allowed = None if padding is None else ~padding[:, None, None, :]
        memory = self.encoder(cells, positions, allowed)
        out: Tensor = self.decoder(query_positions, memory, positions, allowed, every_layer)
        return out
