"""Pixels, masks and boxes as they reach the model and the loss in a run, against torchvision's decoding, resizing and
normalisation of the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import Forward, Observed, observe, small_config, without_validation
from tiny import make_dataset
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tv

from detr_ray.data.index import DatasetIndex
from detr_ray.data.sample import Crop, Flip, Resize, SamplePlan
from detr_ray.model.backbones.resnet import ResNetBackbone
from detr_ray.model.detr import Detr
from detr_ray.structures import Batch, PixelStatistics, StepInfo

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many shapes, so that batches are padded."""
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=6, image_size=(40, 90))


def stored(root: Path, split: str, index: DatasetIndex, row: int) -> Tensor:
    (path,) = (root / f"{split}2017").glob(f"*{index.image_ids[row]:012d}.*")
    return decode_image(str(path), ImageReadMode.RGB)


def normalised(pixels: Tensor) -> Tensor:
    return tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)


def augmented(image: Tensor, sample: SamplePlan) -> Tensor:
    """What the plan says, in torchvision's words."""
    for step in sample.steps:
        match step:
            case Flip(1):
                image = tv.horizontal_flip(image)
            case Resize(size):
                image = tv.resize(image, list(size))
            case Crop(top, left, height, width):
                image = tv.crop(image, top, left, height, width)
    return tv.resize(image, list(sample.size))


def assert_padded_batch(found: Forward, expected: list[Tensor]) -> None:
    """The images lie at the top left, normalised; the rest is 0 and, alone, masked."""
    height, width = (max(image.shape[side] for image in expected) for side in (1, 2))
    assert found.images.dtype is torch.float32
    assert found.images.shape == (len(expected), 3, height, width), "no more is padded than the largest image needs"
    mask = torch.ones(len(expected), height, width, dtype=torch.bool)
    for row, image in enumerate(expected):
        mask[row, : image.shape[1], : image.shape[2]] = False
        torch.testing.assert_close(found.images[row, :, : image.shape[1], : image.shape[2]], image, rtol=0, atol=1e-5)
    assert (found.images.permute(0, 2, 3, 1)[mask] == 0).all()
    if found.mask is None:
        assert not mask.any()
    else:
        assert torch.equal(found.mask, mask)


AUGMENTATIONS = {
    "as stored": "data.augment={flip: 0, scales: [64], max_size: 128, crop: 0}",
    "all": "data.augment={flip: 0.5, scales: [48, 64], max_size: 80, crop: 0.5, crop_scales: [56], crop_min: 40, "
    "crop_max: 56}",
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_training_images_are_torchvisions(
    dataset: Path, tmp_path: Path, augmentation: str, micro_batch_size: int
) -> None:
    settings = (AUGMENTATIONS[augmentation], f"train.micro_batch_size={micro_batch_size}", *without_validation(dataset))
    seen = observe(small_config(dataset, tmp_path, *settings), stop_after=4)
    train = seen.job.data.train
    assert train is not None
    forwards = iter(seen.training)
    shapes = set()
    for step in range(4):
        samples = seen.samples(step)
        expected = [normalised(augmented(stored(dataset, "train", train, s.index), s)) for s in samples]
        for first in range(0, 4, micro_batch_size):
            assert_padded_batch(next(forwards), expected[first : first + micro_batch_size])
        shapes |= {(Flip(1) in s.steps, any(isinstance(step, Crop) for step in s.steps)) for s in samples}
    assert next(forwards, None) is None and any(f.mask is not None for f in seen.training)
    assert len(shapes) == (4 if augmentation == "all" else 1), "all kinds of samples were there"


def test_validation_images_are_torchvisions_at_the_validation_size(dataset: Path, tmp_path: Path) -> None:
    seen = observe(small_config(dataset, tmp_path, "eval={size: 56, max_size: 90, batch_size: 2}"), stop_after=4)
    val = seen.job.data.val
    assert val is not None
    pending = {}
    for row in range(len(val)):
        image = tv.resize(stored(dataset, "val", val, row), [56], max_size=90)
        pending[row] = normalised(image)
    for forward in seen.evaluating:
        assert not forward.training and forward.mask is None, "images of a size are together, nothing is padded"
        for image in forward.images:
            close = [r for r, e in pending.items() if e.shape == image.shape and (e - image).abs().max() < 1e-5]
            assert len(close) == 1, "each image once"
            del pending[close[0]]
    assert not pending


def test_pixels_are_normalised_as_the_backbone_says(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResNetBackbone, "pixels", PixelStatistics(mean=(0.0, 0.0, 0.0), std=(0.5, 1.0, 2.0)))
    seen = observe(small_config(dataset, tmp_path, "train.max_steps=1"))
    assert seen.training and seen.evaluating
    for forward in (*seen.training, *seen.evaluating):
        in_bytes = forward.images * torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1) * 255
        torch.testing.assert_close(in_bytes, in_bytes.round(), rtol=0, atol=1e-3)
        assert 100 < in_bytes.amax() < 255.5


def test_a_model_may_ask_for_more_of_a_batch_than_its_images(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its targets, and what all micro-batches of the step share."""
    given: list[Batch] = []

    def noting(model: Detr, batch: Batch) -> tuple[Any, ...]:
        given.append(batch)
        return batch.images, batch.mask

    monkeypatch.setattr(Detr, "inputs_of", noting)
    seen = observe(small_config(dataset, tmp_path, "train.micro_batch_size=2", "run.seed=5"), stop_after=2)
    assert [batch.targets for batch in given] == [loss.targets for loss in seen.losses]
    most = [max(len(t["labels"]) for batch in given[2 * s : 2 * s + 2] for t in batch.targets) for s in (0, 1)]
    assert [batch.step_info for batch in given] == [StepInfo(5, step, most[step]) for step in (0, 0, 1, 1)]
    assert [batch.positions.tolist() for batch in given] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def boxes_of(seen: Observed, root: Path, sample: SamplePlan) -> tuple[list[int], Tensor]:
    """Labels and cxcywh of an uncropped sample, from the annotations themselves."""
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    image = next(entry for entry in content["images"] if entry["id"] == sample.image_id)
    order = sorted(category["id"] for category in content["categories"])
    labels, boxes = [], []
    for entry in content["annotations"]:
        if entry["image_id"] == sample.image_id and not entry["iscrowd"]:
            left, top, width, height = entry["bbox"]
            labels.append(order.index(entry["category_id"]))
            centre = (left + width / 2) / image["width"]
            boxes.append([1 - centre if Flip(1) in sample.steps else centre, (top + height / 2) / image["height"],
                          width / image["width"], height / image["height"]])  # fmt: skip
    return labels, torch.tensor(boxes).reshape(-1, 4)


def test_the_loss_gets_the_boxes_of_the_images_that_the_model_gets(dataset: Path, tmp_path: Path) -> None:
    augment = "data.augment={flip: 0.5, scales: [48], max_size: 128, crop: 0}"
    seen = observe(small_config(dataset, tmp_path, augment, "train.micro_batch_size=2"), stop_after=4)
    assert len(seen.losses) == len(seen.training) == 8
    for step in range(4):
        samples = seen.samples(step)
        losses = seen.losses[2 * step : 2 * step + 2]
        targets = [target for loss in losses for target in loss.targets]
        total = 0
        for sample, target in zip(samples, targets, strict=True):
            labels, boxes_cxcywh = boxes_of(seen, dataset, sample)
            assert target["labels"].tolist() == labels
            torch.testing.assert_close(target["boxes"], boxes_cxcywh, rtol=0, atol=1e-5)
            total += len(labels)
        # Both normalisers are those of the whole step, in each micro-batch of it.
        weight_sum = total + 0.1 * (4 * 6 - total)
        assert all(loss.normalisers == pytest.approx((total, weight_sum)) for loss in losses)


def test_what_the_loss_judges_is_what_the_model_said(dataset: Path, tmp_path: Path) -> None:
    seen = observe(small_config(dataset, tmp_path), stop_after=2)
    for forward, loss in zip(seen.training, seen.losses, strict=True):
        assert torch.equal(forward.output["pred_logits"], loss.outputs["pred_logits"])
        assert torch.equal(forward.output["pred_boxes"], loss.outputs["pred_boxes"])
        assert len(loss.outputs["aux_outputs"]) == 1
