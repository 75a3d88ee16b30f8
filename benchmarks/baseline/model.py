# ruff: noqa: D102 - what forward() does is what its class says
"""The plain model: torchvision's ResNet, ``torch.nn.MultiheadAttention``, sequence first, a mask for every batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detr_ray.config import ModelConfig

LAST_STAGE = {8: "layer2", 16: "layer3", 32: "layer4"}


class PlainBackbone(nn.Module):
    """ResNet up to a stage, and the padding mask at its resolution."""

    def __init__(self, name: str, norm: str, stride: int) -> None:
        super().__init__()
        frozen = norm == "frozen"
        network = getattr(torchvision.models, name)(
            weights=None, norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        )
        if frozen:
            for parameter_name, parameter in network.named_parameters():
                if not parameter_name.startswith(("layer2", "layer3", "layer4")):
                    parameter.requires_grad_(False)
        self.body = IntermediateLayerGetter(network, {LAST_STAGE[stride]: "features"})
        self.num_channels = (2048 if name in ("resnet50", "resnet101") else 512) * stride // 32

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)["features"]
        small = F.interpolate(mask[None].float(), size=features.shape[-2:])[0]
        return features, small.bool()


class PlainSine(nn.Module):
    """Sine position encoding of a padding mask, channels first."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, mask: Tensor) -> Tensor:
        inside = (~mask).float()
        y, x = inside.cumsum(1), inside.cumsum(2)
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        channel = torch.arange(self.num_features, dtype=torch.float32, device=mask.device)
        frequency = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / self.num_features)
        halves = []
        for coordinate in (y, x):
            angle = coordinate[..., None] / frequency
            halves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
        return torch.cat(halves, dim=3).permute(0, 3, 1, 2)


class PlainEncoderLayer(nn.Module):
    """Self-attention and feed-forward, sequence first."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        y = self.norm1(x) if self.pre_norm else x
        placed = y + positions
        x = x + self.dropout1(self.self_attn(placed, placed, value=y, key_padding_mask=padding)[0])
        x = x if self.pre_norm else self.norm1(x)
        y = self.norm2(x) if self.pre_norm else x
        x = x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(y)))))
        return x if self.pre_norm else self.norm2(x)


class PlainDecoderLayer(nn.Module):
    """Self-attention, attention to the memory and feed-forward, sequence first."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.dropout1, self.dropout2, self.dropout3 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
        y = self.norm1(x) if self.pre_norm else x
        placed = y + queries
        x = x + self.dropout1(self.self_attn(placed, placed, value=y)[0])
        x = x if self.pre_norm else self.norm1(x)
        y = self.norm2(x) if self.pre_norm else x
        found = self.multihead_attn(y + queries, memory + positions, value=memory, key_padding_mask=padding)[0]
        x = x + self.dropout2(found)
        x = x if self.pre_norm else self.norm2(x)
        y = self.norm3(x) if self.pre_norm else x
        x = x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(y)))))
        return x if self.pre_norm else self.norm3(x)


class PlainEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: list[PlainEncoderLayer], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, x: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding, positions)
        return x if self.norm is None else self.norm(x)


class PlainDecoder(nn.Module):
    """A stack of decoder layers, each one's output normalised."""

    def __init__(self, layers: list[PlainDecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
        each = []
        for layer in self.layers:
            x = layer(x, memory, padding, positions, queries)
            each.append(self.norm(x))
        return torch.stack(each)


class PlainTransformer(nn.Module):
    """Encoder and decoder."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        layer = (dim, heads, hidden, dropout, pre_norm)
        norm = nn.LayerNorm(dim) if pre_norm else None
        self.encoder = PlainEncoder([PlainEncoderLayer(*layer) for _ in range(encoder_layers)], norm)
        self.decoder = PlainDecoder([PlainDecoderLayer(*layer) for _ in range(decoder_layers)], nn.LayerNorm(dim))

    def forward(self, features: Tensor, mask: Tensor, query_embed: Tensor, positions: Tensor) -> Tensor:
        batch = features.shape[0]
        cells = features.flatten(2).permute(2, 0, 1)
        positions = positions.flatten(2).permute(2, 0, 1)
        queries = query_embed[:, None].repeat(1, batch, 1)
        padding = mask.flatten(1)
        memory = self.encoder(cells, padding, positions)
        return self.decoder(torch.zeros_like(queries), memory, padding, positions, queries).transpose(1, 2)


class PlainMlp(nn.Module):
    """The box head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class PlainDetr(nn.Module):
    """DETR with auxiliary outputs and the sine position encoding."""

    def __init__(self, section: ModelConfig, num_classes: int) -> None:
        super().__init__()
        dim = section.hidden_dim
        backbone = PlainBackbone(section.backbone, section.backbone_norm, section.backbone_stride)
        self.transformer = PlainTransformer(
            dim, section.num_heads, section.dim_feedforward, section.encoder_layers, section.decoder_layers,
            section.dropout, section.pre_norm,
        )  # fmt: skip
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = PlainMlp(dim)
        self.query_embed = nn.Embedding(section.num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        self.backbone = nn.ModuleList([backbone, PlainSine(dim // 2)])

    def forward(self, images: Tensor, mask: Tensor) -> dict:
        features, small = self.backbone[0](images, mask)
        positions = self.backbone[1](small)
        objects = self.transformer(self.input_proj(features), small, self.query_embed.weight, positions)
        logits, boxes = self.class_embed(objects), self.bbox_embed(objects).sigmoid()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]}
