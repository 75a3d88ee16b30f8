"""DETR in plain torch: backbone, transformer, post-processing, and weights from files.

``build_model`` is the one place where a config section meets the constructors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detr_ray.model.backbone import Backbone
from detr_ray.model.detr import POSITION_ENCODINGS, Detr
from detr_ray.model.postprocess import postprocess
from detr_ray.model.transformer import Transformer

if TYPE_CHECKING:
    from detr_ray.config import ModelConfig

__all__ = ["Detr", "build_model", "postprocess"]


def build_model(cfg_model: ModelConfig, num_classes: int = 91) -> Detr:
    """Builds the architecture with random weights; nothing is read from disk or fetched.

    Args:
        cfg_model: the config's ``model`` section. ``backbone_weights`` and ``init_from`` play no part here.
        num_classes: classes without no-object; 91 for the official COCO ids.

    Raises:
        ValueError: the section's values do not go together.
    """
    dim = cfg_model.hidden_dim
    if cfg_model.position_embedding not in POSITION_ENCODINGS:
        raise ValueError(f"position embedding is 'sine' or 'learned', not {cfg_model.position_embedding!r}")
    return Detr(
        backbone=Backbone(
            cfg_model.backbone,
            norm=cfg_model.backbone_norm,
            stride=cfg_model.backbone_stride,
            dilation=cfg_model.dilation,
        ),
        position_encoding=POSITION_ENCODINGS[cfg_model.position_embedding](dim),
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
