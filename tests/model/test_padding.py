"""An image gives the same alone and padded in a batch: from its pixels on, with `model.ignore_padding`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detr_ray.config import config_from_dict
from detr_ray.model import build_model
from detr_ray.model.features import blank_padding

SMALL = {"backbone": "resnet18", "backbone_weights": "none", "hidden_dim": 32, "num_heads": 4, "dim_feedforward": 48,
         "encoder_layers": 1, "decoder_layers": 2, "num_queries": 9, "dropout": 0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "detr": {"architecture": "detr"},
    "dilated": {"architecture": "detr", "backbone": "resnet50", "dilation": True},
    "one stage": {"architecture": "deformable_detr", "box_refine": True, "num_feature_levels": 5},
    "two stages": {"architecture": "deformable_detr", "box_refine": True, "two_stage": True, "backbone_norm": "batch"},
    "dino": {"architecture": "dino"},
}


@pytest.mark.parametrize("ignored", [True, False], ids=["ignored", "as published"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_plays_a_part_as_published_alone(name: str, ignored: bool) -> None:
    """With sides that no stride divides, of the image and of the batch: borders of cells and images differ."""
    torch.manual_seed(0)
    model = build_model(
        config_from_dict({"model": {**SMALL, **MODELS[name], "ignore_padding": ignored}}, "test").model, 5
    )
    for norm in model.modules():  # fresh norms add nothing, which padding would be seen by
        if hasattr(norm, "running_mean"):
            norm.bias.data.uniform_(0, 0.5)
    model.eval()
    image = torch.randn(1, 3, 75, 90)
    padded, mask = torch.zeros(1, 3, 152, 121), torch.ones(1, 152, 121, dtype=torch.bool)
    padded[:, :, :75, :90], mask[:, :75, :90] = image, False
    with torch.no_grad():
        alone, found = model(image, None), model(padded, mask)
    far = max(float((found[key] - alone[key]).abs().max()) for key in ("pred_logits", "pred_boxes"))
    assert far < 1e-4 if ignored else far > 1e-3, far


def test_blanked_features_stay_channels_last() -> None:
    """Convolutions, ReLUs and pools of a processor take up to twice as long for maps that are stored otherwise."""
    features = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    padding = torch.zeros(2, 4, 5, dtype=torch.bool)
    padding[1, :, 3:] = True
    blanked = blank_padding(features, padding)
    assert blanked.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(blanked, features.masked_fill(padding[:, None], 0))
    assert blank_padding(features, None) is features
