"""DETR: predicts a set of boxes with classes directly from an image.

Combines backbone, position encoding and transformer, and computes classes and boxes from the decoder's output.
Parameter names are those of the published checkpoints. Knows nothing of losses, files or label names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from detr_ray.model.backbones import build_backbone
from detr_ray.model.detection_model import DetectionModel, WeightNames, output_of_layers
from detr_ray.model.features import Backbone
from detr_ray.model.heads import BoxHead
from detr_ray.model.position_encoding import LearnedPositionEncoding, SinePositionEncoding
from detr_ray.model.transformer import Transformer
from detr_ray.structures import ModelOutput

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig


class Detr(DetectionModel):
    """The detector of Carion et al. 2020.

    Args:
        backbone: gives one feature map.
        position_encoding: gives the cells' position vectors, of the transformer's length.
        transformer: turns cells and queries into objects.
        dim: the transformer's vector length.
        num_classes: classes without no-object.
        num_queries: objects that can be found in one image.
        aux_loss: whether the output has the predictions of every decoder layer, not only of the last.
    """

    weight_names = WeightNames(
        class_heads=("class_embed",),
        has_no_object=True,
        query_tables=("query_embed.weight",),
        input_projections=("input_proj.weight",),
        backbone="backbone.0.body.",
        signs=("transformer.", "backbone."),
    )

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: SinePositionEncoding | LearnedPositionEncoding,
        transformer: Transformer,
        dim: int,
        num_classes: int,
        num_queries: int,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.pixels = backbone.pixels
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = BoxHead(dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], dim, kernel_size=1)
        self.backbone = nn.ModuleList([backbone, position_encoding])
        self.aux_loss = aux_loss

    @classmethod
    def from_config(cls, cfg_model: ModelConfig, num_classes: int) -> Self:
        """The model that a config's ``model`` section describes, with random weights.

        Raises:
            ValueError: the section's values do not go together.
        """
        dim = cfg_model.hidden_dim
        return cls(
            backbone=build_backbone(cfg_model, strides=(cfg_model.backbone_stride,)),
            position_encoding=_position_encoding(cfg_model),
            transformer=Transformer(
                dim,
                cfg_model.num_heads,
                cfg_model.dim_feedforward,
                cfg_model.encoder_layers,
                cfg_model.decoder_layers,
                cfg_model.dropout,
                cfg_model.pre_norm,
            ),
            dim=dim,
            num_classes=num_classes,
            num_queries=cfg_model.num_queries,
            aux_loss=cfg_model.aux_loss,
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> ModelOutput:
        """Predicts a set of objects an image.

        Under autocast, the residual stream and the heads keep the parameters' own precision: rounded to bf16, a box in
        a 1000-pixel image would move by pixels.

        Args:
            images: ``[B, 3, H, W]`` float, normalised with ``pixels``.
            mask: ``[B, H, W]`` bool, True on padding; None where no image is padded (same result, less work).

        Returns:
            Logits and boxes of the last decoder layer; with ``aux_loss`` those of the earlier layers as well.
        """
        (level,) = self.backbone[0](images, mask)
        features, padding, _ = level
        positions = self.backbone[1](features, padding).flatten(1, 2)
        precision = self.query_embed.weight.dtype
        cells = self.input_proj(features).flatten(2).transpose(1, 2).to(precision)
        objects = self.transformer(
            cells,
            positions.to(precision),
            None if padding is None else padding.flatten(1),
            self.query_embed.weight,
            every_layer=self.aux_loss,
        )
        with torch.autocast(objects.device.type, enabled=False):
            objects = objects.to(precision)
            logits = self.class_embed(objects)
            boxes_cxcywh = self.bbox_embed(objects).sigmoid()
        return output_of_layers(logits, boxes_cxcywh, self.aux_loss)


def _position_encoding(cfg_model: ModelConfig) -> SinePositionEncoding | LearnedPositionEncoding:
    if cfg_model.position_embedding == "learned":
        return LearnedPositionEncoding(cfg_model.hidden_dim)
    if cfg_model.position_embedding != "sine":
        raise ValueError(f"position embedding is 'sine' or 'learned', not {cfg_model.position_embedding!r}")
    return SinePositionEncoding.from_config(cfg_model)
