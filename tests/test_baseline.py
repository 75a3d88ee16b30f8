"""What the benchmarks compare with computes the same: from the same weights, the same outputs, losses and gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from goldens import golden_state_dict, model_section
from torch import Tensor
from torchvision.ops import box_convert

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.baseline.criterion import PlainCriterion
from benchmarks.baseline.model import PlainDetr
from benchmarks.baseline.training import PlainStep
from detr_ray.config import LossConfig
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.loss import build_criterion
from detr_ray.model import build_model
from detr_ray.structures import Target

NUM_CLASSES = 7
SMALL = {
    "backbone": "resnet18", "hidden_dim": 32, "num_heads": 4, "dim_feedforward": 64, "encoder_layers": 2,
    "decoder_layers": 3, "dropout": 0.0, "num_queries": 9,
}  # fmt: skip
KINDS = [
    {},
    {"backbone": "resnet50"},
    {"backbone_norm": "batch", "backbone_stride": 8, "pre_norm": True, "encoder_layers": 0},
]


def batch() -> tuple[Tensor, Tensor, list[Target]]:
    """Two images, the second padded at the bottom, with 3 boxes and 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 128, generator=generator)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = True
    images[1, :, 64:] = 0
    targets = []
    for count in (3, 1):
        corners = torch.rand(count, 2, 2, generator=generator).sort(1).values.flatten(1)
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        targets.append(Target(labels=labels, boxes=box_convert(corners, "xyxy", "cxcywh")))
    return images, mask, targets


@pytest.mark.parametrize("changes", KINDS, ids=["frozen", "bottleneck", "batch norm, cut, pre-norm"])
def test_the_plain_implementation_computes_the_same(changes: dict) -> None:
    section = model_section(**(SMALL | changes))
    ours = build_model(section, NUM_CLASSES)
    theirs = PlainDetr(section, NUM_CLASSES)
    weights = golden_state_dict(ours)
    ours.load_state_dict(weights, strict=True)
    theirs.load_state_dict(weights, strict=True)
    images, mask, targets = batch()

    # In double precision, so that what differs is what is computed, and not a rounding that tips a ReLU.
    outputs, plain_outputs = ours.double()(images.double(), mask), theirs.double()(images.double(), mask)
    torch.testing.assert_close(outputs["pred_logits"], plain_outputs["pred_logits"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs["pred_boxes"], plain_outputs["pred_boxes"], rtol=1e-6, atol=1e-6)

    criterion, plain_criterion = build_criterion(LossConfig(), NUM_CLASSES), PlainCriterion(NUM_CLASSES).double()
    in_double = [Target(labels=target["labels"], boxes=target["boxes"].double()) for target in targets]
    losses, plain_losses = criterion(outputs, targets), plain_criterion(plain_outputs, in_double)
    assert losses.keys() == plain_losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, plain_losses[name].float(), rtol=1e-5, atol=1e-5, msg=name)

    criterion.total(losses).backward()
    plain_criterion.total(plain_losses).backward()
    plain = dict(theirs.named_parameters())
    whole = torch.stack([p.grad.norm() for p in plain.values() if p.requires_grad]).norm()
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == plain[name].requires_grad, name
        if parameter.requires_grad:
            off = (parameter.grad - plain[name].grad).norm()
            # The first self-attention of the decoder sees zeros: its gradient is rounding.
            assert off <= 1e-5 * plain[name].grad.norm() + 1e-7 * whole, f"{name}: {off:.1e}"


def test_the_plain_step_learns_from_both_groups() -> None:
    section = model_section(**SMALL)
    model = PlainDetr(section, NUM_CLASSES)
    step = PlainStep(model, PlainCriterion(NUM_CLASSES))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    values = step(*batch())
    assert len(values) == 3 * 4 + 1
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert {"class_embed.weight", "transformer.encoder.layers.0.linear1.weight"} <= moved
    assert {name for name in moved if "backbone" in name} == {
        name for name, parameter in model.named_parameters() if "backbone" in name and parameter.requires_grad
    }
    ours = build_optimizer(build_model(section, NUM_CLASSES), {"lr": 1e-4, "lr_backbone": 1e-5}, weight_decay=1e-4)
    for group, own in zip(step.optimizer.param_groups, ours.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"]) == (own["lr"], own["weight_decay"])
        assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in own["params"])
