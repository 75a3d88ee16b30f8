"""DETR: a set of boxes with classes, straight from an image.

Puts backbone, position encoding and transformer together and reads classes and boxes off the decoder's objects.
Parameter names are those of the published checkpoints. Knows nothing of losses, files or label names.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_ray.model.backbone import Backbone
from detr_ray.model.position_encoding import LearnedPositionEncoding, SinePositionEncoding
from detr_ray.model.transformer import Transformer
from detr_ray.structures import LayerOutput, ModelOutput

POSITION_ENCODINGS = {"sine": SinePositionEncoding, "learned": LearnedPositionEncoding}


class BoxHead(nn.Module):
    """A perceptron of three layers, from an object's vector to its box before the sigmoid.

    Args:
        dim: length of the vectors, and hidden width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, objects: Tensor) -> Tensor:
        """``[..., dim]`` -> ``[..., 4]``."""
        for layer in self.layers[:-1]:
            objects = F.relu(layer(objects))
        out: Tensor = self.layers[-1](objects)
        return out


class Detr(nn.Module):
    """The detector.

    Args:
        backbone: gives the feature map.
        position_encoding: gives the cells' position vectors, of the transformer's length.
        transformer: turns cells and queries into objects.
        dim: the transformer's vector length.
        num_classes: classes without no-object.
        num_queries: objects that can be found in one image.
        aux_loss: give every decoder layer's predictions, not only the last's.
    """

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
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = BoxHead(dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        self.backbone = nn.ModuleList([backbone, position_encoding])
        self.aux_loss = aux_loss

    def forward(self, images: Tensor, mask: Tensor | None = None) -> ModelOutput:
        """Predicts a set of objects an image.

        Under autocast, the vectors that layers add to and the heads keep the parameters' own precision: rounded to
        bf16, a box of a 1000-pixel image would move by pixels.

        Args:
            images: ``[B, 3, H, W]`` float, normalised with the ImageNet statistics.
            mask: ``[B, H, W]`` bool, True on padding; None where no image is padded (same result, less work).

        Returns:
            Logits and boxes of the last decoder layer; with ``aux_loss`` those of the earlier layers as well.
        """
        features, padding = self.backbone[0](images, mask)
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
        output = ModelOutput(pred_logits=logits[-1], pred_boxes=boxes_cxcywh[-1])
        if self.aux_loss:
            output["aux_outputs"] = [
                LayerOutput(pred_logits=layer_logits, pred_boxes=layer_boxes)
                for layer_logits, layer_boxes in zip(logits[:-1], boxes_cxcywh[:-1], strict=True)
            ]
        return output

    @property
    def body(self) -> nn.Module:
        """The ResNet, whose names are torchvision's."""
        return cast(Backbone, self.backbone[0]).body
