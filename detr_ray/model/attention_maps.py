"""The attention weights of one forward pass, computed afterwards from the inputs of the attention layers.

Hooks record the inputs; the forward pass itself does not change. Weights are computed for single images and layers,
because those of all layers together may not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_ray.model.attention import MultiheadAttention
from detr_ray.model.deformable_attention import DeformableAttention, MapSizes
from detr_ray.model.detection_model import DetectionModel
from detr_ray.structures import ModelOutput


class SamplingPoints(NamedTuple):
    """The points that queries of a deformable attention read.

    Attributes:
        locations: ``[Q, M, L, P, 2]`` (x, y) in 0..1 of the padded image.
        weights: ``[Q, M, L, P]``; sums to 1 over ``L`` and ``P``.
        references: ``[Q, 2]`` (x, y) in 0..1 of the padded image, around which they lie.
    """

    locations: Tensor
    weights: Tensor
    references: Tensor


class AttentionMap(NamedTuple):
    """The weights of a map's cells for queries of a full attention.

    Attributes:
        weights: ``[M, Q, h, w]``; sums to 1 over ``h`` and ``w``, and is 0 on padding.
    """

    weights: Tensor


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one forward pass.

    Attributes:
        output: what the model gave.
        map_sizes: (height, width) in cells of the maps that encoder and decoder attend to.
        encoder: inputs of each encoder layer's attention.
        decoder: inputs of each decoder layer's attention to the encoder's cells.
    """

    output: ModelOutput
    map_sizes: MapSizes
    encoder: Sequence[tuple[nn.Module, tuple[Any, ...]]]
    decoder: Sequence[tuple[nn.Module, tuple[Any, ...]]]

    @torch.no_grad()
    def of_encoder(self, layer: int, image: int, cells: Sequence[int]) -> AttentionMap | SamplingPoints:
        """The attention of some cells in an encoder layer.

        Args:
            layer: from 0; negative ones count from the last.
            image: place in the batch.
            cells: numbers of cells, row by row of each map, one map after the other.
        """
        return self._of(self.encoder[layer], image, cells)

    @torch.no_grad()
    def of_decoder(self, layer: int, image: int, queries: Sequence[int]) -> AttentionMap | SamplingPoints:
        """The attention of some queries in a decoder layer.

        Args:
            layer: from 0; negative ones count from the last.
            image: place in the batch.
            queries: their numbers.
        """
        return self._of(self.decoder[layer], image, queries)

    def _of(
        self, noted: tuple[nn.Module, tuple[Any, ...]], image: int, rows: Sequence[int]
    ) -> AttentionMap | SamplingPoints:
        attention, inputs = noted
        query = inputs[0][image : image + 1, list(rows)]
        if isinstance(attention, DeformableAttention):
            references = inputs[1][image : image + 1, list(rows)]
            locations, weights = attention.points(query, references, inputs[3])
            return SamplingPoints(locations[0], weights[0], references[0, :, 0, :2])
        assert isinstance(attention, MultiheadAttention)
        allowed = inputs[3] if len(inputs) > 3 else None
        allowed = allowed if allowed is None or len(allowed) == 1 else allowed[image : image + 1]
        weights = attention.weights(query, inputs[1][image : image + 1], allowed)[0]
        return AttentionMap(weights.view(*weights.shape[:2], *self.map_sizes[0]))


def record_attention(model: DetectionModel, images: Tensor, mask: Tensor | None) -> AttentionRecord:
    """Runs a model and records the inputs of its attention layers.

    The model is in evaluation mode meanwhile; afterwards its mode is restored.

    Args:
        model: with layers in ``transformer.encoder`` and ``transformer.decoder``, as all architectures here have them.
        images: ``[B, 3, H, W]``, normalised.
        mask: ``[B, H, W]`` bool, True on padding; None where nothing is padded.
    """
    transformer = model.get_submodule("transformer")
    encoder = [layer.get_submodule("self_attn") for layer in _layers(transformer, "encoder")]
    crossing = [
        layer.get_submodule("cross_attn" if hasattr(layer, "cross_attn") else "multihead_attn")
        for layer in _layers(transformer, "decoder")
    ]
    noted: dict[nn.Module, tuple[Any, ...]] = {}
    sizes: list[tuple[int, int]] = []

    def note(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        noted[attention] = inputs

    def note_map(projection: nn.Module, inputs: tuple[Any, ...], features: Tensor) -> None:
        sizes.append((features.shape[-2], features.shape[-1]))

    hooks = [attention.register_forward_pre_hook(note) for attention in (*encoder, *crossing)]
    projections = model.get_submodule("input_proj")
    for projection in projections if isinstance(projections, nn.ModuleList) else [projections]:
        hooks.append(projection.register_forward_hook(note_map))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(images, mask)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return AttentionRecord(
        output,
        tuple(sizes),
        [(attention, noted[attention]) for attention in encoder],
        [(attention, noted[attention]) for attention in crossing],
    )


def _layers(transformer: nn.Module, part: str) -> list[nn.Module]:
    layers = transformer.get_submodule(part).get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return list(layers)
