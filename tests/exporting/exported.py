"""Small models on their way into files, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detr_ray.config import load_config
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import build_detector
from detr_ray.exporting import ExportSource

SMALL = (
    "model={backbone: resnet18, backbone_weights: none, backbone_stride: 8, hidden_dim: 32, num_heads: 2}",
    "model={dim_feedforward: 32, encoder_layers: 1, decoder_layers: 1, num_queries: 12}",
)
DEFORMABLE = ("model={architecture: deformable_detr, num_feature_levels: 3, box_refine: true}",)
UNREFINED = ("model={architecture: deformable_detr, num_feature_levels: 4, encoder_layers: 2, decoder_layers: 6}",)
TWO_STAGES = (*DEFORMABLE, "model={two_stage: true, mixed_query_selection: true, decoder_layers: 2}")
DINO = ("model={architecture: dino, num_feature_levels: 3, denoising_queries: 4, decoder_layers: 2}",)
NAMES = ("cat", "dog", None)


def source(*overrides: str, **changes: Any) -> ExportSource:
    """A model whose predictions depend on everything: no two queries, places or classes give the same."""
    torch.manual_seed(0)
    config = load_config(None, [*SMALL, *overrides])
    detector = build_detector(config.model, config.loss, len(NAMES))
    model = detector.model.eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(std=0.2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("bbox_embed", "class_embed", "sampling_offsets.weight", "attention_weights")):
            nn.init.normal_(parameter, std=0.3)
    values: dict[str, Any] = {
        "model": model,
        "class_loss": detector.criterion.class_loss,
        "label_map": LabelMap(NAMES, (7, 9, None)),
        "architecture": config.model.architecture,
        "size": 64,
        "max_size": 100,
        "max_detections": 10,
        "name": "a test",
        "step": 5,
        "weights_sha256": "c0ffee",
    }
    return ExportSource(**{**values, **changes})
