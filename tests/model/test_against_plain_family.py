"""Deformable DETR and DINO against a plain writing of both, where no published numbers are recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_family import PlainFamily, gradients, layers_of
from torch import Tensor

from detr_ray.config import load_config
from detr_ray.model import build_model
from detr_ray.model.denoising import DenoisingQueries, draw_noise, groups_for, noised
from detr_ray.structures import StepInfo, Target, padding_mask

CLASSES = 5
DEFORMABLE: dict[str, Any] = {
    "architecture": "deformable_detr", "backbone": "resnet18", "hidden_dim": 64, "num_heads": 4, "dim_feedforward": 48,
    "encoder_layers": 1, "decoder_layers": 3, "num_queries": 7, "dropout": 0,
}  # fmt: skip
TWO_STAGE = {**DEFORMABLE, "box_refine": True, "two_stage": True}
FREE = {"mixed_query_selection": True, "look_forward_twice": True}
DINO = {**DEFORMABLE, "architecture": "dino", "denoising_queries": 6}
CASES = {
    "one level": {**DEFORMABLE, "num_feature_levels": 1},
    "five levels, other points": {**DEFORMABLE, "num_feature_levels": 5, "encoder_points": 2, "decoder_points": 3},
    "refinement alone": {**DEFORMABLE, "box_refine": True, "look_forward_twice": True, "one_to_many_queries": 4},
    "two stages of one level": {**TWO_STAGE, "num_feature_levels": 1, "num_queries": 3},
    "two stages of five levels": {**TWO_STAGE, "num_feature_levels": 5},
    "two stages with all": {**TWO_STAGE, **FREE, "one_to_many_queries": 9},
    "dino of five levels": {**DINO, "num_feature_levels": 5, "position_temperature": 10000, "position_offset": -0.5},
}


def denoising(targets: list[Target], queries: int) -> DenoisingQueries:
    counts = [len(target["labels"]) for target in targets]
    info = StepInfo(seed=1, step=2, most_boxes=max(counts))
    noise = draw_noise([3, 4], counts, info, groups_for(queries, max(counts)), CLASSES, 0.5)
    return noised(targets, noise, 1.0, 1e-3)


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_those_of_the_plain_model(keys: dict[str, Any]) -> None:
    """Odd sizes, both images padded, places beyond the maps, weights that are nowhere zero."""
    torch.manual_seed(0)
    config = load_config(None, [f"model.{key}={value}" for key, value in keys.items()])
    model = build_model(config.model, CLASSES).train()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("backbone."):
                value.add_(torch.randn_like(value) * (1.0 if name.endswith("sampling_offsets.bias") else 0.1))
    images, mask = torch.randn(2, 3, 75, 107), padding_mask(torch.tensor([[75, 67], [50, 107]]), 75, 107)
    inputs: tuple[Any, ...] = (images.masked_fill(mask[:, None], 0.0), mask)
    targets = [Target(labels=torch.arange(count), boxes=torch.rand(count, 4) * 0.3 + 0.3) for count in (2, 1)]
    queries = (denoising(targets, keys["denoising_queries"]),) if keys["architecture"] == "dino" else ()
    output = model(*inputs, *queries)
    names = ("enc_outputs", "interm_outputs", "one_to_many_outputs", "dn_outputs")
    found = {"": layers_of(output), **{name: layers_of(output[name]) for name in names if name in output}}
    expected = PlainFamily(model, config.model)(*inputs, *(queries or (None,)))
    assert found.keys() == expected.keys()
    for name, layers in found.items():
        for (logits, boxes), (plain_logits, plain_boxes) in zip(layers, expected[name], strict=True):
            torch.testing.assert_close(logits, plain_logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(boxes, plain_boxes, rtol=0, atol=1e-5)

    def weigh(part: Tensor) -> Tensor:
        return (part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum()

    parts = sorted(found)
    mine = gradients(model, [found[name] for name in parts], weigh)
    plain = gradients(model, [expected[name] for name in parts], weigh)
    assert mine.keys() == plain.keys()
    largest = max(float(gradient.norm()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert float((mine[name] - gradient).norm()) < 2e-3 * float(gradient.norm()) + 1e-6 * largest, name
