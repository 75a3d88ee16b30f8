"""An encoder whose inner values are computed again in the backward pass: the same gradients, and less is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_ray.config import load_config
from detr_ray.detector import build_detector
from detr_ray.structures import Target

TINY = (
    "backbone=resnet18", "backbone_norm=batch", "hidden_dim=32", "num_heads=4", "dim_feedforward=64",
    "encoder_layers=3", "decoder_layers=2", "num_queries=12", "dropout=0.2",
)  # fmt: skip


def gradients(keys: tuple[str, ...], precision: str, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and bytes that its forward pass kept."""
    config = load_config(None, [f"model.{key}" for key in (*TINY, *keys)])
    torch.manual_seed(0)
    detector = build_detector(config.model, config.loss, 5)
    model = detector.model.train()
    if recompute:
        model.recompute_encoder()
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    targets = [Target(labels=torch.tensor([1, 4]), boxes=torch.rand(2, 4) * 0.3 + 0.3) for _ in range(2)]
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = value
        return value

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = model(images, mask)
    size = sum(value.untyped_storage().nbytes() for value in kept.values())
    detector.criterion.total(detector.criterion(output, targets)).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}, size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "keys",
    [("pre_norm=true",), ("architecture=deformable_detr", "two_stage=true"), ("architecture=dino",)],
    ids=["detr", "deformable_detr", "dino"],
)
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(keys: tuple[str, ...], precision: str) -> None:
    """With dropout, which has to drop the same again."""
    expected, all_kept = gradients(keys, precision, recompute=False)
    found, kept = gradients(keys, precision, recompute=True)
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert kept < all_kept
