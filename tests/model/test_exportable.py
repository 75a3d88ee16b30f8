"""Models without what only training needs predict what they predicted before."""

from __future__ import annotations

import pytest
import torch
from test_backbone import randomise_norms
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detr_ray.config import load_config
from detr_ray.model import DetectionModel, build_model
from detr_ray.model.exportable import exportable, reduce_to_inference

SMALL = (
    "model={backbone: resnet18, backbone_weights: none, backbone_stride: 16, hidden_dim: 32, num_heads: 2}",
    "model={dim_feedforward: 32, encoder_layers: 1, decoder_layers: 2, num_queries: 6}",
)
VARIANTS = {
    "detr": (),
    "ignoring padding": ("model.ignore_padding=true",),
    "deformable": ("model={architecture: deformable_detr, num_feature_levels: 3}",),
    "dino": ("model={architecture: dino, denoising_queries: 4}",),
    "two stages": ("model={architecture: deformable_detr, two_stage: true, box_refine: true}",),
}


def small_model(*overrides: str) -> DetectionModel:
    torch.manual_seed(0)
    model = build_model(load_config(None, [*SMALL, *overrides]).model, num_classes=3)
    randomise_norms(model.body)
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name or "sampling_offsets" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_predicts_the_same(variant: str) -> None:
    model = small_model(*VARIANTS[variant])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    copied = exportable(model.train())
    with torch.no_grad():
        expected, got = model.eval()(images, mask), copied(images, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-5)
    assert "aux_outputs" in expected and "aux_outputs" not in got
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in copied.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["plain", "channels last in bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reducing_a_model_to_inference_changes_no_bit(variant: str, layout: str) -> None:
    # torch multiplies matrices in another way where weights may get a gradient.
    model = small_model(*VARIANTS[variant]).requires_grad_(False)
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    if layout != "plain":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=layout != "plain"):
        expected = model(images, mask)
        reduce_to_inference(model)
        got = model(images, mask)
    assert "aux_outputs" in expected and "aux_outputs" not in got
    assert torch.equal(got["pred_logits"], expected["pred_logits"])
    assert torch.equal(got["pred_boxes"], expected["pred_boxes"])
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
