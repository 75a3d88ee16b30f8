"""The plain input pipeline: a map-style data set with Pillow transforms, and floats padded in the collate function."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Target = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths in pixels that are drawn from; the original's by default.

    Attributes:
        scales: of the short side in the end.
        max_size: most that the long side may have.
        crop_scales: of the short side before a crop.
        crop_min: least side of a crop.
        crop_max: most side of a crop.
    """

    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_min: int = 384
    crop_max: int = 600


ORIGINAL = Sizes()


class CocoFolder(Dataset):
    """Images of a COCO folder with boxes in corners, augmented as DETR does in training.

    Args:
        annotations: COCO JSON.
        images: folder.
        sizes: what the augmentation draws from.
    """

    def __init__(self, annotations: str | Path, images: str | Path, sizes: Sizes = ORIGINAL) -> None:
        content = json.loads(Path(annotations).read_text())
        self.images = Path(images)
        self.sizes = sizes
        self.records = sorted(content["images"], key=lambda record: record["id"])
        self.boxes_of: dict[int, list[dict]] = {record["id"]: [] for record in self.records}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                self.boxes_of[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """One augmented, normalised image, and its target."""
        record = self.records[i]
        image = Image.open(self.images / record["file_name"]).convert("RGB")
        annotations = self.boxes_of[record["id"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        image, target = augment(image, {"boxes": boxes[keep], "labels": labels[keep]}, self.sizes)
        pixels = functional.normalize(functional.to_tensor(image), MEAN, STD)
        sides = torch.tensor([image.width, image.height, image.width, image.height])
        left_top, right_bottom = target["boxes"][:, :2], target["boxes"][:, 2:]
        target["boxes"] = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=1) / sides
        return pixels, target


def augment(image: Image.Image, target: Target, sizes: Sizes) -> tuple[Image.Image, Target]:
    """Flip; then resize, or resize, crop and resize."""
    if random.random() < 0.5:
        image = functional.hflip(image)
        boxes = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        target = {**target, "boxes": boxes + torch.tensor([image.width, 0, image.width, 0])}
    if random.random() < 0.5:
        image, target = resize(image, target, random.choice(sizes.crop_scales), None)
        image, target = random_crop(image, target, sizes)
    return resize(image, target, random.choice(sizes.scales), sizes.max_size)


def resize(image: Image.Image, target: Target, short: int, max_size: int | None) -> tuple[Image.Image, Target]:
    """Brings the short side to a length, or the long one to its limit."""
    least, most = min(image.size), max(image.size)
    if max_size is not None and most / least * short > max_size:
        short = round(max_size * least / most)
    long = int(short * most / least)
    size = (short, long) if image.height <= image.width else (long, short)
    resized = functional.resize(image, size)
    ratio_x, ratio_y = resized.width / image.width, resized.height / image.height
    return resized, {**target, "boxes": target["boxes"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])}


def random_crop(image: Image.Image, target: Target, sizes: Sizes) -> tuple[Image.Image, Target]:
    """Cuts a region out; boxes are clipped to it, those outside of it dropped."""
    width = random.randint(min(sizes.crop_min, image.width), min(image.width, sizes.crop_max))
    height = random.randint(min(sizes.crop_min, image.height), min(image.height, sizes.crop_max))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image = functional.crop(image, top, left, height, width)
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = torch.minimum(boxes.reshape(-1, 2, 2), torch.tensor([width, height])).clamp(min=0).reshape(-1, 4)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return image, {"boxes": boxes[keep], "labels": target["labels"][keep]}


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, Tensor, list[Target]]:
    """Pads normalised images to the largest; the mask is True on padding."""
    height = max(image.shape[1] for image, _ in samples)
    width = max(image.shape[2] for image, _ in samples)
    images = torch.zeros(len(samples), 3, height, width)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        images[k, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[k, : image.shape[1], : image.shape[2]] = False
    return images, mask, [target for _, target in samples]


def data_loader(dataset: Dataset[Any], batch_size: int, num_workers: int) -> DataLoader:
    """Shuffled batches, in this process or from others."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
