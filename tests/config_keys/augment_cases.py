"""Keys of the section `data.augment`, seen in what is planned for the samples of a run.

That pixels and boxes follow the plan is shown in ``tests/seams/test_what_the_model_gets.py``.
"""

from __future__ import annotations

import pytest
import torch
from config_keys.registry import Place, shows

from detr_ray.data.sample import Crop, Flip, Resize, SamplePlan
from detr_ray.data.transforms.colour import MakeGrey
from detr_ray.structures import IMAGENET_PIXELS


def planned(place: Place, augment: str, *more: str) -> list[SamplePlan]:
    return place.samples(f"data.augment={{{augment}}}", *more, steps=12)


def crops(samples: list[SamplePlan]) -> list[Crop]:
    return [step for sample in samples for step in sample.steps if isinstance(step, Crop)]


def shorts(samples: list[SamplePlan]) -> set[int]:
    return {min(sample.size) for sample in samples}


@shows("data.augment.transforms")
def transforms(place: Place) -> None:
    """What each of them and its parameters do is shown in ``tests/engine/test_configured_augmentation.py``."""
    samples = planned(place, "transforms: [grayscale: {p: 1}, detr, vertical_flip: {p: 0.5, until_epoch: 2}]")
    assert all(MakeGrey() in sample.steps for sample in samples)
    flipped = [Flip(0) in sample.steps for sample in samples]
    assert 0.2 < sum(flipped[:32]) / 32 < 0.8 and not any(flipped[32:]), "an epoch has 16 images"
    images = place.train("data.augment={transforms: [grayscale: {p: 1}, detr]}", stop_after=1).training[0].images
    levels = images * torch.tensor(IMAGENET_PIXELS.std).view(3, 1, 1) + torch.tensor(IMAGENET_PIXELS.mean).view(3, 1, 1)
    assert (levels[:, 0] - levels[:, 1]).abs().median() < 1e-3


@shows("data.augment.flip")
def flip(place: Place) -> None:
    shares = [sum(Flip(1) in sample.steps for sample in planned(place, f"flip: {p}")) / 48 for p in (0, 0.5, 1)]
    assert shares[0] == 0 and 0.2 < shares[1] < 0.8 and shares[2] == 1
    images = [place.train(f"data.augment.flip={p}", stop_after=1).training[0].images for p in (0, 1)]
    assert (images[0].flip(3) - images[1]).abs().mean() < (images[0] - images[1]).abs().mean()


@shows("data.augment.scales")
def scales(place: Place) -> None:
    assert shorts(planned(place, "scales: [50, 60, 70], crop: 0, max_size: 500")) == {50, 60, 70}


@shows("data.augment.max_size")
def max_size(place: Place) -> None:
    longest = [max(max(s.size) for s in planned(place, f"scales: [60], crop: 0, max_size: {m}")) for m in (70, 500)]
    assert 69 <= longest[0] <= 70 and longest[1] > 71


@shows("data.augment.crop")
def crop(place: Place) -> None:
    rest = "crop_scales: [40], crop_min: 30, crop_max: 40"
    shares = [len(crops(planned(place, f"crop: {p}, {rest}"))) / 48 for p in (0, 0.5, 1)]
    assert shares[0] == 0 and 0.2 < shares[1] < 0.8 and shares[2] == 1


@shows("data.augment.crop_scales")
def crop_scales(place: Place) -> None:
    samples = planned(place, "crop: 1, crop_scales: [44, 55], crop_min: 30, crop_max: 40")
    resizes = [step for sample in samples for step in sample.steps if isinstance(step, Resize)]
    assert {min(step.size) for step in resizes} == {44, 55}


@shows("data.augment.crop_min", "data.augment.crop_max")
def crop_sides(place: Place) -> None:
    samples = planned(place, "crop: 1, crop_scales: [60], crop_min: 33, crop_max: 37")
    sides = {side for crop in crops(samples) for side in (crop.height, crop.width)}
    assert sides == {33, 34, 35, 36, 37}


@shows("data.augment.shared_draws")
def shared_draws(place: Place) -> None:
    """Images of like aspect get the same scale."""
    many = "scales: [41, 42, 43, 44, 45, 46, 47, 48, 49, 50], crop: 0, max_size: 500, flip: 0"

    def scales_of_an_epoch(shared: int) -> int:
        return len(shorts(planned(place, f"{many}, shared_draws: {shared}")[:16]))

    assert scales_of_an_epoch(16) == 1 < scales_of_an_epoch(1)
    with pytest.raises(AssertionError):
        assert scales_of_an_epoch(4) == 1
