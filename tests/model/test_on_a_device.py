"""What a training step asks of a GPU, without one: torch's fake tensors know their device, but hold no numbers.

Reading a number from them fails, as does an operation on two devices: so nothing waits for the device but the matching,
and no tensor is left on the host. Kernels and results are tried by ``tests/gpu``, where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_ray.config import load_config
from detr_ray.detector import build_skeleton
from detr_ray.detector.postprocess import postprocess
from detr_ray.loss import HungarianMatcher, build_criterion
from detr_ray.loss.matcher import _checks
from detr_ray.loss.prediction_sets import Matches
from detr_ray.model.deformable_attention import _WeightedCells
from detr_ray.model.denoising import Noise, noised
from detr_ray.structures import Target

CLASSES = 7
TINY = (
    "backbone=resnet18", "hidden_dim=32", "num_heads=4", "dim_feedforward=64", "encoder_layers=1", "decoder_layers=2",
    "num_queries=20",
)  # fmt: skip
TWO_STAGE = ("architecture=deformable_detr", "two_stage=true")


def first_pairs(self: HungarianMatcher, sets: Any, activations: Any, class_loss: Any) -> list[Matches]:
    """Computes on the device what the matching reads from there, and pairs box ``i`` of an image with query ``i``."""
    found = []
    for one, active in zip(sets, activations, strict=True):
        assert all(part.is_cuda for part in _checks(one, active, class_loss.num_classes))
        if one.pairs is None:
            assert self._costs(one, active, class_loss).is_cuda
        counts = one.targets.counts
        queries = np.concatenate([np.arange(count) for count in counts])
        columns = (np.repeat(np.arange(len(counts)), counts), queries, np.arange(len(queries)))
        images, *pairs = (torch.from_numpy(column) for column in columns)
        found.append(one.pairs or Matches(images, *(rows.expand(len(one.logits), -1) for rows in pairs)))
    return found


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("backbone_norm=batch", "ignore_padding=true"),
        ("position_embedding=learned", "pre_norm=true"),
        ("architecture=deformable_detr",),
        TWO_STAGE,
        (*TWO_STAGE, "mixed_query_selection=true", "look_forward_twice=true", "one_to_many_queries=6"),
        (*TWO_STAGE, "num_queries=900", "ignore_padding=true"),
        ("architecture=dino",),
        ("architecture=dino", "num_feature_levels=5", "num_queries=900", "ignore_padding=true"),
    ],
    ids=lambda keys: " ".join(keys) or "detr",
)
def test_a_step_waits_for_the_device_only_to_match(
    keys: tuple[str, ...], counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HungarianMatcher, "match", first_pairs)
    config = load_config(None, [f"model.{key}" for key in (*TINY, *keys)])
    model, criterion = build_skeleton(config.model, CLASSES), build_criterion(config, CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        device = torch.device("cuda")
        images, mask = torch.rand(2, 3, 64, 96, device=device), torch.zeros(2, 64, 96, dtype=torch.bool, device=device)
        targets = [
            Target(labels=torch.zeros(n, dtype=torch.int64, device=device), boxes=torch.rand(n, 4, device=device))
            for n in counts
        ]
        more = ()
        if config.model.denoising_queries:
            shape = (2, 3, 2, max(counts))
            noise = Noise(np.zeros(shape, np.int64), np.zeros((*shape, 4), np.float32))
            monkeypatch.setattr(
                "detr_ray.model.denoising.copied", lambda array, place: torch.from_numpy(array).to(place)
            )
            more = (noised(targets, noise, 1.0, 1e-3),)
        output = model.train()(images, mask, *more)
        total = criterion.total(criterion(output, targets))
        assert total.is_cuda and total.requires_grad
        with torch.no_grad():
            (first, _) = postprocess(model.eval()(images, mask), torch.full((2, 2), 64), criterion.class_loss)
        assert first["boxes"].is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_of_reading_maps_stays_on_the_device(dtype: torch.dtype) -> None:
    """By itself, since torch runs a whole backward pass only on a device that is there."""

    class Kept:
        needs_input_grad = (True, True, True)
        sizes = ((9, 12), (5, 6))
        saved_tensors: tuple[Tensor, ...]

    with FakeTensorMode():
        bordered = sum((height + 2) * (width + 1) + 1 for height, width in Kept.sizes)
        kept = Kept()
        kept.saved_tensors = (
            torch.rand(2, bordered, 4, 8, device="cuda", dtype=dtype),
            torch.rand(2, 7, 4, 2, 3, 2, device="cuda"),
            torch.rand(2, 7, 4, 2, 3, device="cuda"),
        )
        *gradients, _ = _WeightedCells.backward(kept, torch.rand(2, 7, 32, device="cuda", dtype=dtype))
    for gradient, of in zip(gradients, kept.saved_tensors, strict=True):
        assert gradient.is_cuda and gradient.shape == of.shape and gradient.dtype == of.dtype
