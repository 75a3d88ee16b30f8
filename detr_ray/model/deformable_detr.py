"""Deformable DETR (Zhu et al. 2020), with its refinement of boxes, its two stages and the options of H-DETR.

Feature maps of several resolutions become one sequence of cells; queries read it at a few points around a reference,
and move the reference from layer to layer. Parameter names are those of the published checkpoints; what these list
under several names has one name here (`DeformableDetr.published_twins`). Knows nothing of losses, files or label names.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from detr_ray.architectures import published_values
from detr_ray.model.backbones import build_backbone
from detr_ray.model.deformable_transformer import DeformableTransformer, TransformerSizes
from detr_ray.model.detection_model import DetectionModel, WeightNames, output_of_layers
from detr_ray.model.features import Backbone
from detr_ray.model.heads import moved, new_box_head, new_class_head
from detr_ray.model.position_encoding import SinePositionEncoding, waves
from detr_ray.model.proposals import SILENT, at_cells, best_cells, cell_anchors, repetitions
from detr_ray.model.pyramid import Pyramid, build_pyramid, input_projections, strides_for
from detr_ray.structures import LayerOutput, ModelOutput

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

QUERY_TEMPERATURE = 10000.0


class Queries(NamedTuple):
    """The decoder's input.

    Attributes:
        contents: ``[B, Q, dim]``.
        positions: ``[B, Q, dim]``.
        references: ``[B, Q, 2 or 4]``, points (x, y) or boxes (cx, cy, w, h) in 0..1 of the unpadded image.
        proposals: the encoder's predictions for each cell, if queries are made of them.
        is_repeated: ``[B, Q]`` bool, which queries are the same as one before; None where all differ.
    """

    contents: Tensor
    positions: Tensor
    references: Tensor
    proposals: LayerOutput | None = None
    is_repeated: Tensor | None = None


class DeformableDetr(DetectionModel):
    """The detector.

    Args:
        backbone: its feature maps are ordered by the number of cells, largest first.
        position_encoding: encodes the positions of cells.
        transformer: encoder and decoder, with one or two stages.
        dim: the transformer's vector length.
        num_levels: feature maps that the transformer reads; those that the backbone does not give are made here.
        num_classes: classes.
        num_queries: objects that can be found in one image.
        box_refine: each decoder layer corrects the boxes of the one before.
        mixed_query_selection: with two stages, the contents of queries are learned.
        look_forward_twice: a layer's boxes are trained through the layer before as well.
        ignore_padding: leave padding out where maps are projected (`InputProjection`).
        one_to_many_queries: further queries in training, separate from the others.
        aux_loss: whether the output has the predictions of every decoder layer, not only of the last.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: SinePositionEncoding,
        transformer: DeformableTransformer,
        dim: int,
        num_levels: int,
        num_classes: int,
        num_queries: int,
        box_refine: bool,
        mixed_query_selection: bool,
        look_forward_twice: bool,
        ignore_padding: bool,
        one_to_many_queries: int,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.pixels = backbone.pixels
        self.transformer = transformer
        self.two_stage = hasattr(transformer, "enc_output")
        self.box_refine, self.look_forward_twice = box_refine, look_forward_twice
        if not box_refine:
            self.advice_on_twins = ": a model with heads for each layer needs model.box_refine=true"
        self.mixed_query_selection = mixed_query_selection
        self.one_to_many_queries = one_to_many_queries
        self.aux_loss = aux_loss
        self._add_heads(dim, num_classes)
        all_queries = num_queries + one_to_many_queries
        if not self.two_stage:
            self.query_embed = nn.Embedding(all_queries, 2 * dim)
        elif mixed_query_selection:
            self.query_embed = nn.Embedding(all_queries, dim)
        self.input_proj = input_projections(backbone.channels, num_levels, dim, ignore_padding=ignore_padding)
        self.backbone = nn.ModuleList([backbone, position_encoding])
        heads = [f"class_embed.{number}" for number in range(len(self.class_embed))]
        self.weight_names = WeightNames(
            class_heads=tuple(heads[:-1] if self.two_stage else heads),
            object_heads=tuple(heads[-1:] if self.two_stage else ()),
            has_no_object=False,
            query_tables=("query_embed.weight",),
            input_projections=tuple(
                name for name, value in self.named_parameters() if name.startswith("input_proj") and value.dim() == 4
            ),
            backbone="backbone.0.body.",
            signs=("transformer.", "backbone."),
        )

    def _add_heads(self, dim: int, num_classes: int) -> None:
        """Heads of classes and boxes: one for all layers; with refinement one a layer, with two stages one more."""
        class_head, box_head = new_class_head(dim, num_classes), new_box_head(dim)
        layers = len(self.transformer.decoder.layers)
        heads = layers + self.two_stage if self.box_refine else 1
        self.class_embed = nn.ModuleList([copy.deepcopy(class_head) for _ in range(heads)])
        self.bbox_embed = nn.ModuleList([copy.deepcopy(box_head) for _ in range(heads)])
        if not self.two_stage:
            # The first layer's references are points, so its boxes start small. Later layers start from its boxes.
            with torch.no_grad():
                self.bbox_embed.get_parameter("0.layers.2.bias")[2:] = -2.0

    @classmethod
    def from_config(cls, cfg_model: ModelConfig, num_classes: int) -> Self:
        """The model that a config's ``model`` section describes, with random weights.

        Raises:
            ValueError: the section's values do not go together.
        """
        values = published_values(cfg_model)
        levels = values["num_feature_levels"]
        strides = strides_for(levels, finest=8, coarsest=cfg_model.backbone_stride)
        return cls(
            backbone=build_backbone(cfg_model, strides),
            position_encoding=SinePositionEncoding.from_config(cfg_model),
            transformer=DeformableTransformer(TransformerSizes.from_config(cfg_model), values["two_stage"]),
            dim=cfg_model.hidden_dim,
            num_levels=levels,
            num_classes=num_classes,
            num_queries=values["num_queries"],
            box_refine=values["box_refine"],
            mixed_query_selection=values["mixed_query_selection"],
            look_forward_twice=values["look_forward_twice"],
            one_to_many_queries=values["one_to_many_queries"],
            ignore_padding=getattr(cfg_model, "ignore_padding", False),
            aux_loss=cfg_model.aux_loss,
        )

    @property
    def published_twins(self) -> dict[str, str]:
        """Further names of heads in published files -> name here."""
        twins: dict[str, str] = {}
        heads = len(self.transformer.decoder.layers) + self.two_stage
        for kind in ("class_embed", "bbox_embed"):
            tensors = [name for name in self.state_dict() if name.startswith(f"{kind}.")]
            if not self.box_refine:
                for tensor in tensors:
                    rest = tensor.removeprefix(f"{kind}.0.")
                    twins |= {f"{kind}.{number}.{rest}": tensor for number in range(1, heads)}
            elif kind == "bbox_embed" or self.two_stage:
                twins |= {f"transformer.decoder.{tensor}": tensor for tensor in tensors}
        return twins

    def forward(self, images: Tensor, mask: Tensor | None = None) -> ModelOutput:
        """Predicts a set of objects an image.

        Under autocast, the residual stream, references and heads keep the parameters' own precision.

        Args:
            images: ``[B, 3, H, W]`` float, normalised with ``pixels``.
            mask: ``[B, H, W]`` bool, True on padding; None where no image is padded (same result, less work).

        Returns:
            Logits and boxes of the last decoder layer; with ``aux_loss`` those of the earlier layers; with two stages
            those of all cells of the encoder; in training those of the one-to-many queries, where there are some.
        """
        backbone, encoding = self.backbone
        levels = backbone(images, mask)
        pyramid = build_pyramid(levels, mask, self.input_proj, encoding, self.transformer.level_embed)
        memory = pyramid.with_cells(self.transformer.encoder(pyramid))
        main = self.num_queries
        count = main + (self.one_to_many_queries if self.training else 0)
        queries = self._proposed_queries(memory, count) if self.two_stage else self._learned_queries(memory, count)
        logits, boxes_cxcywh = self._decode(queries, memory)
        output = output_of_layers(logits[:, :, :main], boxes_cxcywh[:, :, :main], self.aux_loss)
        if queries.proposals is not None:
            output["enc_outputs"] = queries.proposals
        if count > main:
            more = output_of_layers(logits[:, :, main:], boxes_cxcywh[:, :, main:], self.aux_loss)
            output["one_to_many_outputs"] = more
        return output

    def _learned_queries(self, memory: Pyramid, count: int) -> Queries:
        batch = memory.cells.shape[0]
        positions, contents = self.query_embed.weight[:count].expand(batch, -1, -1).chunk(2, dim=-1)
        with torch.autocast(memory.cells.device.type, enabled=False):
            references = self.transformer.reference_points(positions).sigmoid()
        return Queries(contents, positions, references)

    def _proposed_queries(self, memory: Pyramid, count: int) -> Queries:
        """Queries from the cells that most probably show an object.

        If there are fewer usable cells than queries, the best ones are used repeatedly; with learned contents, as other
        queries.
        """
        transformer = self.transformer
        anchors, is_usable = cell_anchors(memory)
        with torch.autocast(memory.cells.device.type, enabled=False):
            usable_cells = memory.cells.masked_fill(~is_usable[..., None], 0.0)
            cells = transformer.enc_output_norm(transformer.enc_output(usable_cells))
            logits = self.class_embed[-1](cells)
            box_logits = (self.bbox_embed[-1](cells) + anchors).masked_fill(~is_usable[..., None], torch.inf)
            # The encoder's loss trains class 0 to say that there is an object, whatever its class.
            chosen = best_cells(logits[..., 0], is_usable, count)
            references = at_cells(box_logits.detach(), chosen).sigmoid()
            described = waves(references * (2 * math.pi), cells.shape[-1] // 2, QUERY_TEMPERATURE)
            placed = transformer.pos_trans_norm(transformer.pos_trans(described.flatten(2).to(cells.dtype)))
        proposals = LayerOutput(pred_logits=logits, pred_boxes=box_logits.sigmoid())
        positions, contents = placed.chunk(2, dim=-1)
        if self.mixed_query_selection:
            contents = self.query_embed.weight[:count].expand_as(positions)
            return Queries(contents, positions, references, proposals)
        groups = (self.num_queries, count - self.num_queries)  # the two do not attend to each other
        is_repeated = torch.cat([repetitions(is_usable, size) for size in groups if size], dim=1)
        return Queries(contents, positions, references, proposals, is_repeated)

    def _decode(self, queries: Queries, memory: Pyramid) -> tuple[Tensor, Tensor]:
        """Logits and boxes of every decoder layer, ``[layers, B, Q, ...]``.

        Queries that are the same find the same, and only one of them may say so.
        """
        objects, references = queries.contents, queries.references
        start = references  # the boxes of a layer are relative to these
        allowed = self._allowed(objects)
        logits, boxes = [], []
        for number, layer in enumerate(self.transformer.decoder.layers):
            objects = layer(objects, queries.positions, memory.in_each_map(references), memory, allowed)
            head = number if self.box_refine else 0
            with torch.autocast(objects.device.type, enabled=False):
                objects = objects.to(references.dtype)
                logits.append(self.class_embed[head](objects))
                change = self.bbox_embed[head](objects)
                boxes.append(moved(start, change))
                if self.box_refine:
                    refined = moved(references, change) if self.look_forward_twice else boxes[-1]
                    references = refined.detach()
                    start = refined if self.look_forward_twice else references
        found = torch.stack(logits)
        if queries.is_repeated is not None:
            found = found.masked_fill(queries.is_repeated[..., None], SILENT)
        return found, torch.stack(boxes)

    def _allowed(self, objects: Tensor) -> Tensor | None:
        """The self-attention mask: main queries and one-to-many queries do not attend to each other."""
        if objects.shape[1] == self.num_queries:
            return None
        is_main = torch.arange(objects.shape[1], device=objects.device) < self.num_queries
        return is_main[:, None] == is_main
