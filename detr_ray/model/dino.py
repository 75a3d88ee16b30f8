"""DINO (Zhang et al. 2022): deformable attention, queries placed by the encoder, and denoising in training.

What it shares with two-stage Deformable DETR is in `pyramid`, `proposals` and `deformable_transformer`; its denoising
queries are made in `denoising`. Parameter names are those of the published checkpoints, which list the heads that all
layers share under several names (`Dino.published_twins`). Knows nothing of losses, files or label names.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from detr_ray.architectures import published_values
from detr_ray.model.backbones import build_backbone
from detr_ray.model.deformable_transformer import (
    DeformableDecoder,
    DeformableDecoderLayer,
    PyramidTransformer,
    TransformerSizes,
)
from detr_ray.model.denoising import (
    DenoisingQueries,
    allowed_pairs,
    draw_noise,
    groups_for,
    no_denoising,
    noised,
)
from detr_ray.model.detection_model import DetectionModel, WeightNames, output_of_layers
from detr_ray.model.features import Backbone
from detr_ray.model.heads import Perceptron, moved, new_box_head, new_class_head
from detr_ray.model.position_encoding import SinePositionEncoding, waves
from detr_ray.model.proposals import SILENT, at_cells, best_cells, cell_anchors, repetitions
from detr_ray.model.pyramid import Pyramid, build_pyramid, input_projections, strides_for
from detr_ray.structures import Batch, DenoisingOutput, LayerOutput, ModelOutput

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

QUERY_TEMPERATURE = 10000.0
EPS = 1e-3
"""Smallest distance of the references' coordinates from 0 and 1."""


class DinoDecoder(DeformableDecoder):
    """Decoder layers, the norm after each of them, and the perceptron that encodes boxes as positions.

    Args:
        layers: the layers.
        dim: length of the vectors.
    """

    def __init__(self, layers: list[DeformableDecoderLayer], dim: int) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(dim)
        self.ref_point_head = Perceptron((2 * dim, dim, dim))

    def query_positions(self, references_cxcywh: Tensor) -> Tensor:
        """Boxes ``[B, Q, 4]`` in 0..1 of the padded image as position vectors ``[B, Q, dim]``."""
        cx, cy, w, h = references_cxcywh.unbind(-1)
        in_order = torch.stack((cy, cx, w, h), dim=-1)
        channels = self.norm.normalized_shape[0] // 2
        described = waves(in_order * (2 * math.pi), channels, QUERY_TEMPERATURE).flatten(2)
        out: Tensor = self.ref_point_head(described.to(self.norm.weight.dtype))
        return out


class DinoTransformer(PyramidTransformer):
    """The transformer of DINO, with the heads of the encoder.

    Args:
        sizes: its sizes.
        num_queries: queries, whose contents are learned.
        num_classes: classes.
    """

    decoder: DinoDecoder

    def __init__(self, sizes: TransformerSizes, num_queries: int, num_classes: int) -> None:
        dim = sizes.dim
        super().__init__(sizes, lambda layers: DinoDecoder(layers, dim))
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.tgt_embed = nn.Embedding(num_queries, dim)
        self.reset_parameters()
        self.enc_out_class_embed = new_class_head(dim, num_classes)
        self.enc_out_bbox_embed = new_box_head(dim)

    def described(self, cells: Tensor) -> Tensor:
        """Encoded cells ``[B, S, dim]``, projected and normalised for the encoder's heads."""
        out: Tensor = self.enc_output_norm(self.enc_output(cells))
        return out


class Dino(DetectionModel):
    """The detector.

    Args:
        backbone: gives feature maps, the one with the most cells first.
        position_encoding: gives the cells' position vectors.
        transformer: encoder and decoder, and the encoder's heads.
        num_levels: feature maps that the transformer reads; those that the backbone does not give are made here.
        num_classes: classes.
        num_queries: objects that can be found in one image.
        denoising_queries: approximate number of positive denoising queries in training, and of negative ones.
        denoising_label_noise: half of this share of their labels is replaced.
        denoising_box_noise: how far their boxes are moved.
        ignore_padding: leave padding out where maps are projected (`InputProjection`), and describe the boxes of
            queries in units of the image instead of the padded map.
        aux_loss: whether the output has the predictions of every decoder layer, not only of the last.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: SinePositionEncoding,
        transformer: DinoTransformer,
        num_levels: int,
        num_classes: int,
        num_queries: int,
        denoising_queries: int,
        denoising_label_noise: float,
        denoising_box_noise: float,
        ignore_padding: bool,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.denoising_queries = denoising_queries
        self.denoising_label_noise, self.denoising_box_noise = denoising_label_noise, denoising_box_noise
        self.ignore_padding = ignore_padding
        self.pixels = backbone.pixels
        self.aux_loss = aux_loss
        self.transformer = transformer
        dim = transformer.level_embed.shape[1]
        # One head for all layers, at first equal to the encoder's; in lists, because of the published names.
        self.class_embed = nn.ModuleList([copy.deepcopy(transformer.enc_out_class_embed)])
        self.bbox_embed = nn.ModuleList([copy.deepcopy(transformer.enc_out_bbox_embed)])
        self.label_enc = nn.Embedding(num_classes + 1, dim)
        self.input_proj = input_projections(backbone.channels, num_levels, dim, ignore_padding=ignore_padding)
        self.backbone = nn.ModuleList([backbone, position_encoding])
        self.weight_names = WeightNames(
            class_heads=("class_embed.0", "transformer.enc_out_class_embed"),
            has_no_object=False,
            query_tables=("transformer.tgt_embed.weight",),
            input_projections=tuple(
                name for name, value in self.named_parameters() if name.startswith("input_proj") and value.dim() == 4
            ),
            backbone="backbone.0.body.",
            signs=("transformer.", "backbone."),
            class_tables=("label_enc.weight",),
        )

    @classmethod
    def from_config(cls, cfg_model: ModelConfig, num_classes: int) -> Self:
        """The model that a config's ``model`` section describes, with random weights.

        Raises:
            ValueError: the section's values do not go together.
        """
        values = published_values(cfg_model)
        levels, queries = values["num_feature_levels"], values["num_queries"]
        strides = strides_for(levels, finest=8 if levels < 5 else 4, coarsest=cfg_model.backbone_stride)
        return cls(
            backbone=build_backbone(cfg_model, strides),
            position_encoding=SinePositionEncoding.from_config(cfg_model),
            transformer=DinoTransformer(TransformerSizes.from_config(cfg_model), queries, num_classes),
            num_levels=levels,
            num_classes=num_classes,
            num_queries=queries,
            denoising_queries=values["denoising_queries"],
            denoising_label_noise=values["denoising_label_noise"],
            denoising_box_noise=values["denoising_box_noise"],
            ignore_padding=getattr(cfg_model, "ignore_padding", False),
            aux_loss=cfg_model.aux_loss,
        )

    @property
    def published_twins(self) -> dict[str, str]:
        """Further names of the shared heads in published files -> name here."""
        twins: dict[str, str] = {}
        for kind in ("class_embed", "bbox_embed"):
            for tensor in [name for name in self.state_dict() if name.startswith(f"{kind}.")]:
                rest = tensor.removeprefix(f"{kind}.0.")
                for layer in range(len(self.transformer.decoder.layers)):
                    twins[f"{kind}.{layer}.{rest}"] = tensor
                    twins[f"transformer.decoder.{kind}.{layer}.{rest}"] = tensor
                del twins[tensor]
        return twins

    def inputs_of(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of ``forward`` for a batch; in training with denoising queries."""
        info = batch.step_info
        if info is None or not self.denoising_queries:
            return batch.images, batch.mask
        noise = draw_noise(
            batch.positions.tolist(),
            [len(target["labels"]) for target in batch.targets],
            info,
            groups_for(self.denoising_queries, info.most_boxes),
            self.num_classes,
            self.denoising_label_noise,
        )
        return batch.images, batch.mask, noised(batch.targets, noise, self.denoising_box_noise, EPS)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, denoising: DenoisingQueries | None = None
    ) -> ModelOutput:
        """Predicts a set of objects an image.

        Under autocast, the residual stream, references and heads keep the parameters' own precision.

        Args:
            images: ``[B, 3, H, W]`` float, normalised with ``pixels``.
            mask: ``[B, H, W]`` bool, True on padding; None where no image is padded (same result, less work).
            denoising: further queries, to which the others do not attend.

        Returns:
            Logits and boxes of the last decoder layer; with ``aux_loss`` those of the earlier layers; those of the
            encoder for the cells that became queries; with ``denoising`` those of its queries.
        """
        backbone, encoding = self.backbone
        levels = backbone(images, mask)
        pyramid = build_pyramid(levels, mask, self.input_proj, encoding, self.transformer.level_embed)
        memory = pyramid.with_cells(self.transformer.encoder(pyramid))
        proposals = self._proposals(memory)
        # Also without denoising queries, so that the label embedding has a gradient in every step.
        extra = no_denoising(images.shape[0], images.device) if denoising is None else denoising
        logits, boxes_cxcywh = self._decode(proposals["pred_boxes"].detach(), extra, memory)
        first = extra.labels.shape[1]
        output = output_of_layers(logits[:, :, first:], boxes_cxcywh[:, :, first:], self.aux_loss)
        output["interm_outputs"] = proposals
        if denoising is not None:
            found = output_of_layers(logits[:, :, :first], boxes_cxcywh[:, :, :first], self.aux_loss)
            output["dn_outputs"] = DenoisingOutput(**found, groups=denoising.groups)
        return output

    def _proposals(self, memory: Pyramid) -> LayerOutput:
        """The encoder's predictions for the cells that most probably show an object of any class.

        Cells are ranked without a gradient; the chosen ones are computed again with one.
        """
        transformer = self.transformer
        anchors, is_usable = cell_anchors(memory)
        with torch.autocast(memory.cells.device.type, enabled=False):
            cells = memory.cells.masked_fill(~is_usable[..., None], 0.0)
            with torch.no_grad():
                scores = transformer.enc_out_class_embed(transformer.described(cells)).amax(-1)
            chosen = best_cells(scores, is_usable, self.num_queries)
            described = transformer.described(at_cells(cells, chosen))
            box_logits = transformer.enc_out_bbox_embed(described) + at_cells(anchors, chosen)
            # Repeated cells are masked: otherwise they would be trained as background when another query of the same
            # cell matches a box. If no cell at all is usable, an unusable one was chosen, which is masked, too.
            is_repeated = repetitions(is_usable, self.num_queries)
            is_usable = is_usable.gather(1, chosen)
            return LayerOutput(
                pred_logits=transformer.enc_out_class_embed(described).masked_fill(is_repeated[..., None], SILENT),
                pred_boxes=box_logits.masked_fill(~is_usable[..., None], torch.inf).sigmoid(),
            )

    def _decode(self, references_cxcywh: Tensor, denoising: DenoisingQueries, memory: Pyramid) -> tuple[Tensor, Tensor]:
        """Logits and boxes of the decoder layers, ``[layers, B, P + Q, ...]``, of denoising queries first.

        Without ``aux_loss`` only those of the last layer.

        Boxes are relative to references with a gradient, so they train the layer before as well. References are updated
        by the heads' output before the decoder's norm, predictions are made after it.
        """
        decoder, class_head, box_head = self.transformer.decoder, self.class_embed[0], self.bbox_embed[0]
        labels = self.label_enc(denoising.labels.clamp(min=0)).masked_fill((denoising.labels < 0)[..., None], 0.0)
        contents = self.transformer.tgt_embed.weight.expand(references_cxcywh.shape[0], -1, -1)
        objects = torch.cat((labels, contents), dim=1)
        start = torch.cat((denoising.reference_logits.sigmoid(), references_cxcywh), dim=1)
        allowed = allowed_pairs(labels.shape[1], denoising.groups, contents.shape[1], objects.device)
        logits, boxes = [], []
        for layer in decoder.layers:
            references = start.detach()
            in_each_map = memory.in_each_map(references)
            with torch.autocast(objects.device.type, enabled=False):
                positions = decoder.query_positions(references if self.ignore_padding else in_each_map[:, :, 0])
            objects = layer(objects, positions, in_each_map, memory, allowed)
            with torch.autocast(objects.device.type, enabled=False):
                objects = objects.to(start.dtype)
                if self.aux_loss or layer is decoder.layers[-1]:
                    found = decoder.norm(objects)
                    logits.append(class_head(found))
                    boxes.append(moved(start, box_head(found), EPS))
                start = moved(references, box_head(objects), EPS)
        return torch.stack(logits), torch.stack(boxes)
