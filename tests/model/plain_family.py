"""Deformable DETR and DINO written down plainly, to hold the models against where no published numbers are recorded.

Every map by itself, ``grid_sample`` and stacked samples, one layer after the other, boxes as the published code
computes them. The backbone is the model's own. Parameters are read under the published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_ray.architectures import published_values
from detr_ray.config import ModelConfig
from detr_ray.model import DetectionModel
from detr_ray.model.denoising import DenoisingQueries

Layers = list[tuple[Tensor, Tensor]]
"""Logits and boxes of each decoder layer."""


def logit(x: Tensor, eps: float) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine(values: Tensor, channels: int, temperature: float) -> Tensor:
    """``[...]``, scaled to 0..2 pi, as ``[..., channels]``."""
    number = torch.arange(channels, dtype=torch.float32)
    angle = values[..., None] / temperature ** (2 * torch.div(number, 2, rounding_mode="floor") / channels)
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2)


class PlainFamily:
    """The forward pass in training.

    Args:
        model: gives parameters and backbone.
        cfg_model: says what it is made of.
    """

    def __init__(self, model: DetectionModel, cfg_model: ModelConfig) -> None:
        self.model, self.config, self.values = model, cfg_model, published_values(cfg_model)
        self.is_dino = cfg_model.architecture == "dino"
        self.eps = 1e-3 if self.is_dino else 1e-5
        self.parameters = dict(model.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[self.model.published_twins.get(name, name)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def perceptron(self, name: str, x: Tensor, layers: int = 3) -> Tensor:
        for number in range(layers - 1):
            x = self.linear(f"{name}.layers.{number}", x).relu()
        return self.linear(f"{name}.layers.{layers - 1}", x)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.linear2", self.linear(f"{name}.linear1", x).relu())

    def __call__(self, images: Tensor, mask: Tensor, denoising: DenoisingQueries | None) -> dict[str, Layers]:
        """All predictions, by the names that the model has for them."""
        self._read_maps(images, mask)
        memory = self._encoded()
        found: dict[str, Layers] = {}
        main = self.values["num_queries"]
        count = main + self.values.get("one_to_many_queries", 0)
        if self.is_dino or self.values["two_stage"]:
            contents, positions, references = self._proposed(memory, count, found)
        else:
            positions, contents = self["query_embed.weight"].expand(len(images), -1, -1).chunk(2, -1)
            references = self.linear("transformer.reference_points", positions).sigmoid()
        first, hidden = 0, torch.zeros(count, count, dtype=torch.bool)
        hidden[main:, :main] = hidden[:main, main:] = True
        if denoising is not None:
            first = denoising.labels.shape[1]
            known = self["label_enc.weight"][denoising.labels.clamp(min=0)] * (denoising.labels >= 0)[..., None]
            contents = torch.cat((known, contents), 1)
            references = torch.cat((denoising.reference_logits.sigmoid(), references), 1)
            hidden = torch.zeros(first + count, first + count, dtype=torch.bool)
            hidden[first:, :first] = True
            size = first // denoising.groups
            for start in range(0, first, size):
                hidden[start : start + size, :start] = True
                hidden[start : start + size, start + size : first] = True
        layers = self._decoded(contents, positions, references, memory, hidden)
        ends = {"dn_outputs": first, "": first + main, "one_to_many_outputs": first + count}
        for (name, end), start in zip(ends.items(), (0, first, first + main), strict=True):
            if end > start:
                found[name] = [(logits[:, start:end], boxes[:, start:end]) for logits, boxes in layers]
        return found

    def _read_maps(self, images: Tensor, mask: Tensor) -> None:
        levels = self.model.backbone[0](images, mask)  # type: ignore[index]
        maps: list[Tensor] = []
        for number in range(self.values["num_feature_levels"]):
            name = f"input_proj.{number}"
            is_given = number < len(levels)
            source = levels[min(number, len(levels) - 1)].features if number <= len(levels) else maps[-1]
            step = {} if is_given else {"stride": 2, "padding": 1}
            projected = F.conv2d(source, self[f"{name}.0.weight"], self[f"{name}.0.bias"], **step)
            maps.append(F.group_norm(projected, 32, self[f"{name}.1.weight"], self[f"{name}.1.bias"]))
        self.sizes = [tuple(one.shape[-2:]) for one in maps]
        masks = [F.interpolate(mask[None].float(), size=size)[0].bool() for size in self.sizes]
        self.masks, self.padding = masks, torch.cat([one.flatten(1) for one in masks], 1)
        self.valid = [torch.stack(((~one[:, 0]).sum(1), (~one[:, :, 0]).sum(1)), -1) for one in masks]
        extents = [torch.tensor([width, height]) for height, width in self.sizes]
        self.ratios = torch.stack([valid / extent for valid, extent in zip(self.valid, extents, strict=True)], 1)
        self.cells = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        self.positions = torch.cat(
            [
                self._cell_positions(one).flatten(1, 2) + self["transformer.level_embed"][number]
                for number, one in enumerate(masks)
            ],
            1,
        )

    def _cell_positions(self, mask: Tensor) -> Tensor:
        offset, temperature = self.values["position_offset"], self.values["position_temperature"]
        parts = []
        for axis in (1, 2):
            number = (~mask).cumsum(axis)
            last = number.select(axis, -1).unsqueeze(axis)
            scaled = (number + offset) / (last + 1e-6) * 2 * math.pi
            parts.append(sine(scaled, self.config.hidden_dim // 2, temperature))
        return torch.cat(parts, -1)

    def _middles(self) -> list[Tensor]:
        """Middles of each map's cells, ``[B, h * w, 2]`` of the unpadded image."""
        middles = []
        for (height, width), valid in zip(self.sizes, self.valid, strict=True):
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            middles.append(torch.stack((x, y), -1).view(1, -1, 2) / valid[:, None])
        return middles

    def _encoded(self) -> Tensor:
        cells = self.cells
        references = torch.cat(self._middles(), 1)[:, :, None] * self.ratios[:, None]
        for number in range(self.config.encoder_layers):
            name = f"transformer.encoder.layers.{number}"
            points = self.values["encoder_points"]
            read = self._sampled(f"{name}.self_attn", cells + self.positions, references, cells, points)
            cells = self.norm(f"{name}.norm1", cells + read)
            cells = self.norm(f"{name}.norm2", cells + self.feed_forward(name, cells))
        return cells

    def _sampled(self, name: str, query: Tensor, references: Tensor, memory: Tensor, points: int) -> Tensor:
        batch, queries, dim = query.shape
        heads, levels = self.config.num_heads, len(self.sizes)
        value = self.linear(f"{name}.value_proj", memory).masked_fill(self.padding[..., None], 0.0)
        shape = (batch, queries, heads, levels, points)
        offsets = self.linear(f"{name}.sampling_offsets", query).view(*shape, 2)
        weights = self.linear(f"{name}.attention_weights", query).view(*shape[:3], -1).softmax(-1)
        spread = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            places = spread + offsets / torch.tensor([size[::-1] for size in self.sizes])[:, None]
        else:
            places = spread[..., :2] + offsets / points * spread[..., 2:] * 0.5
        samples, start = [], 0
        for level, (height, width) in enumerate(self.sizes):
            cells = value[:, start : start + height * width].transpose(1, 2)
            start += height * width
            maps = cells.reshape(batch * heads, dim // heads, height, width)
            grid = (2 * places[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
            samples.append(F.grid_sample(maps, grid, align_corners=False))
        by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
        read = (torch.cat(samples, -1) * by_head).sum(-1).view(batch, dim, queries).transpose(1, 2)
        return self.linear(f"{name}.output_proj", read)

    def _proposed(self, memory: Tensor, count: int, found: dict[str, Layers]) -> tuple[Tensor, Tensor, Tensor]:
        """Contents, positions and references of the queries; what the encoder finds is added to ``found``."""
        anchors = torch.cat(
            [torch.cat((xy, torch.full_like(xy, 0.05 * 2.0**level)), -1) for level, xy in enumerate(self._middles())], 1
        )
        unusable = self.padding | ~((anchors > 0.01) & (anchors < 0.99)).all(-1)
        kept = memory.masked_fill(unusable[..., None], 0.0)
        cells = self.norm("transformer.enc_output_norm", self.linear("transformer.enc_output", kept))
        last = self.config.decoder_layers
        names = ("transformer.enc_out_class_embed", "transformer.enc_out_bbox_embed")
        class_head, box_head = names if self.is_dino else (f"class_embed.{last}", f"bbox_embed.{last}")
        logits = self.linear(class_head, cells)
        anchor_logits = torch.log(anchors / (1 - anchors)).masked_fill(unusable[..., None], torch.inf)
        boxes = (self.perceptron(box_head, cells) + anchor_logits).sigmoid()
        scores = logits.amax(-1) if self.is_dino else logits[..., 0]
        assert int((~unusable).sum(1).min()) >= count, "all queries have a cell of their own in these cases"
        top = scores.masked_fill(unusable, -torch.inf).topk(count, dim=1).indices[..., None]
        references = boxes.take_along_dim(top, 1).detach()
        if self.is_dino:
            found["interm_outputs"] = [(logits.take_along_dim(top, 1), boxes.take_along_dim(top, 1))]
            contents = self["transformer.tgt_embed.weight"].expand(len(memory), -1, -1)
            return contents, contents, references
        found["enc_outputs"] = [(logits, boxes)]
        described = sine(references * 2 * math.pi, self.config.hidden_dim // 2, 10000).flatten(2)
        both = self.norm("transformer.pos_trans_norm", self.linear("transformer.pos_trans", described))
        positions, contents = both.chunk(2, -1)
        if self.values["mixed_query_selection"]:
            contents = self["query_embed.weight"].expand(len(memory), -1, -1)
        return contents, positions, references

    def _decoded(
        self, objects: Tensor, positions: Tensor, references: Tensor, memory: Tensor, hidden: Tensor
    ) -> Layers:
        layers: Layers = []
        start = references
        refines = self.is_dino or self.values["box_refine"]
        forward_twice = self.is_dino or self.values["look_forward_twice"]
        for number in range(self.config.decoder_layers):
            name = f"transformer.decoder.layers.{number}"
            ratios = self.ratios if references.shape[-1] == 2 else self.ratios.repeat(1, 1, 2)
            in_maps = references[:, :, None] * ratios[:, None]
            if self.is_dino:
                placed = in_maps[:, :, 0][..., [1, 0, 2, 3]] * 2 * math.pi
                described = sine(placed, self.config.hidden_dim // 2, 10000).flatten(2)
                positions = self.perceptron("transformer.decoder.ref_point_head", described, 2)
            seen = self._attended(f"{name}.self_attn", objects + positions, objects, hidden)
            objects = self.norm(f"{name}.norm2", objects + seen)
            points = self.values["decoder_points"]
            read = self._sampled(f"{name}.cross_attn", objects + positions, in_maps, memory, points)
            objects = self.norm(f"{name}.norm1", objects + read)
            objects = self.norm(f"{name}.norm3", objects + self.feed_forward(name, objects))
            seen = self.norm("transformer.decoder.norm", objects) if self.is_dino else objects
            box_head = f"bbox_embed.{number}"
            boxes = self._moved(start, self.perceptron(box_head, seen))
            layers.append((self.linear(f"class_embed.{number}", seen), boxes))
            if refines:
                refined = self._moved(references, self.perceptron(box_head, objects))
                references = refined.detach()
                start = refined if forward_twice else references
        return layers

    def _attended(self, name: str, placed: Tensor, objects: Tensor, hidden: Tensor) -> Tensor:
        read, _ = F.multi_head_attention_forward(
            placed.transpose(0, 1), placed.transpose(0, 1), objects.transpose(0, 1), placed.shape[-1],
            self.config.num_heads, self[f"{name}.in_proj_weight"], self[f"{name}.in_proj_bias"], None, None, False, 0.0,
            self[f"{name}.out_proj.weight"], self[f"{name}.out_proj.bias"], need_weights=False, attn_mask=hidden,
        )  # fmt: skip
        return read.transpose(0, 1)

    def _moved(self, references: Tensor, change: Tensor) -> Tensor:
        before = logit(references, self.eps)
        return (change + F.pad(before, (0, 4 - before.shape[-1]))).sigmoid()


def layers_of(output: Any) -> Layers:
    """The predictions of a model's output, first layer first."""
    return [(one["pred_logits"], one["pred_boxes"]) for one in (*output.get("aux_outputs", ()), output)]


def gradients(model: DetectionModel, found: Sequence[Layers], weigh: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of all predictions."""
    model.zero_grad(set_to_none=True)
    torch.stack([weigh(part) for layers in found for pair in layers for part in pair]).sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
