"""Augmentation: images/s on one core, each transform beside torchvision's v2 class and Albumentations'.

    python -m benchmarks augmentation

32 images of COCO with their boxes, decoded before, 640 x 480 pixels at most. Each side does the same kind of thing to
every image with its boxes, one image after the other on one thread. Ours holds the planning of the samples. Where an
image is made of several, the others are decoded before, too. Rows for Albumentations (2.0.8, MIT) are there where it
can be imported; it is no dependency.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.harness import Row, SkippedBenchmark, Timing, alternate
from detr_ray.config import AugmentConfig
from detr_ray.data.decoding import decode_image
from detr_ray.data.formats import open_split
from detr_ray.data.images import ImageReader
from detr_ray.data.label_map import LabelMap
from detr_ray.data.planner import Planner
from detr_ray.data.sample import Picture, SamplePlan
from detr_ray.data.transforms.sequence import TransformSequence
from detr_ray.engine.stream.augmentation import augmentation_of

COCO128 = Path(__file__).parents[2] / "shared" / "data" / "coco128"
IMAGES, ROUNDS = 32, 7
SHORTS = (256, 288, 320)
LAST = {"flip": 0.5, "scales": SHORTS, "max_size": 512, "crop": 0}
"""The original's last part, without its crop: what both others have too."""

OURS: dict[str, list[Any]] = {
    "photometric": [{"photometric": {"p": 1}}],
    "grayscale": [{"grayscale": {"p": 1}}],
    "blur": [{"blur": {"p": 1}}],
    "jpeg": [{"jpeg": {"p": 1}}],
    "horizontal_flip": [{"horizontal_flip": {"p": 1}}],
    "rotate90": [{"rotate90": {"p": 1}}],
    "zoom_out": [{"zoom_out": {"p": 1}}],
    "iou_crop": [{"iou_crop": {"p": 1}}],
    "scale_jitter": [{"scale_jitter": {"size": 512}}],
    "cutout": [{"cutout": {"p": 1}}],
    "mosaic": [{"mosaic": {"p": 1}}],
    "mixup": [{"mixup": {"p": 1}}],
    "copy_paste": [{"copy_paste": {"p": 1}}],
    "the original's": ["detr"],
    "a strong recipe": ["zoom_out", "iou_crop", "detr", "photometric"],
}


class Sides:
    """The same images for each side."""

    def __init__(self) -> None:
        if not COCO128.is_dir():
            raise SkippedBenchmark(f"the reference data is not here: no folder {COCO128}")
        index = open_split(str(COCO128), None, "train").first(IMAGES)
        labels = LabelMap.contiguous(index.categories)
        reader = ImageReader(index)
        self.sizes = np.stack([index.heights, index.widths], axis=1)
        self.pictures = [
            Picture(
                decode_image(reader.read(row), reader.name(row)).permute(1, 2, 0), index.training_instances(row, labels)
            )
            for row in range(IMAGES)
        ]

    def ours(self, transforms: list[Any]) -> Callable[[], None]:
        """An epoch of this project's, another one at each call."""
        decides_size = any("detr" in item or "scale_jitter" in item for item in transforms)
        config = AugmentConfig.model_validate(
            {"transforms": [*transforms, *([] if decides_size else ["detr"])], **LAST}
        )
        policy = TransformSequence(augmentation_of(config).entries[: len(transforms)])
        ids = np.arange(IMAGES)
        planner = Planner(
            self.sizes[:, 0], self.sizes[:, 1], ids, seed=0, global_batch_size=IMAGES, size_policy=policy
        )  # fmt: skip
        steps = itertools.count()

        def done(plan: SamplePlan) -> Picture:
            return plan.apply(self.pictures[plan.index], [done(partner) for partner in plan.partners])

        def run() -> None:
            for plan in planner.global_batch(next(steps)):
                done(plan).pixels.contiguous()

        return run

    def torchvision(self, transform: v2.Transform) -> Callable[[], None]:
        """All images through a v2 transform with boxes, of which those without area are dropped."""
        whole = v2.Compose([transform, v2.SanitizeBoundingBoxes()])
        inputs = [
            {
                "image": tv_tensors.Image(picture.pixels.permute(2, 0, 1)),
                "boxes": tv_tensors.BoundingBoxes(
                    picture.instances.boxes_xyxy_px, format="XYXY", canvas_size=picture.instances.size
                ),
                "labels": torch.from_numpy(picture.instances.labels),
            }
            for picture in self.pictures
        ]  # fmt: skip

        def run() -> None:
            for one in inputs:
                whole(one)["image"].contiguous()

        return run

    def albumentations(self, make: Callable[[Any], Any]) -> Callable[[], None]:
        """All images through a transform of Albumentations with boxes."""
        albumentations = importlib.import_module("albumentations")
        importlib.import_module("cv2").setNumThreads(0)
        boxes = albumentations.BboxParams(format="pascal_voc", label_fields=["labels"])
        whole = albumentations.Compose([make(albumentations)], bbox_params=boxes)
        inputs = [
            {
                "image": np.ascontiguousarray(picture.pixels.numpy()),
                "bboxes": picture.instances.boxes_xyxy_px,
                "labels": picture.instances.labels,
            }
            for picture in self.pictures
        ]

        def run() -> None:
            for one in inputs:
                whole(**one)

        return run


def _torchvision() -> dict[str, v2.Transform]:
    shortest = v2.RandomShortestSize(list(SHORTS), max_size=512, antialias=True)
    return {
        "photometric": v2.ColorJitter(0.125, 0.5, 0.5, 0.05),
        "grayscale": v2.Grayscale(3),
        "blur": v2.GaussianBlur(7, (0.1, 2.0)),
        "jpeg": v2.JPEG((30, 95)),
        "horizontal_flip": v2.RandomHorizontalFlip(1.0),
        "zoom_out": v2.RandomZoomOut(side_range=(1, 4), p=1.0),
        "iou_crop": v2.RandomIoUCrop(),
        "scale_jitter": v2.Compose([v2.ScaleJitter((512, 512), (0.1, 2.0)), v2.RandomCrop(512, pad_if_needed=True)]),
        "cutout": v2.RandomErasing(p=1.0, scale=(0.0025, 0.06)),
        "the original's": v2.Compose([v2.RandomHorizontalFlip(), shortest]),
        "a strong recipe": v2.Compose(
            [
                v2.RandomZoomOut(side_range=(1, 4)), v2.RandomApply([v2.RandomIoUCrop()], 0.8),
                v2.RandomHorizontalFlip(), shortest, v2.RandomApply([v2.ColorJitter(0.125, 0.5, 0.5, 0.05)], 0.5),
            ]
        ),
    }  # fmt: skip


def _albumentations() -> dict[str, Callable[[Any], Any]]:
    def strong(a: Any) -> Any:
        return a.Sequential(
            [
                a.CropAndPad(percent=(0.0, 1.5), sample_independently=True, keep_size=False, p=0.5),
                a.RandomSizedBBoxSafeCrop(320, 320, p=0.8), a.HorizontalFlip(p=0.5),
                a.SmallestMaxSize(max_size=list(SHORTS), p=1.0),
                a.ColorJitter((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05), p=0.5),
            ], p=1.0,
        )  # fmt: skip

    return {
        "photometric": lambda a: a.ColorJitter((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05), p=1.0),
        "grayscale": lambda a: a.ToGray(p=1.0),
        "blur": lambda a: a.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=1.0),
        "jpeg": lambda a: a.ImageCompression(quality_range=(30, 95), p=1.0),
        "horizontal_flip": lambda a: a.HorizontalFlip(p=1.0),
        "rotate90": lambda a: a.RandomRotate90(p=1.0),
        "zoom_out": lambda a: a.CropAndPad(percent=(0.0, 1.5), sample_independently=True, keep_size=False, p=1.0),
        "iou_crop": lambda a: a.AtLeastOneBBoxRandomCrop(240, 320, p=1.0),
        "cutout": lambda a: a.CoarseDropout((1, 3), (0.05, 0.25), (0.05, 0.25), p=1.0),
        "the original's": lambda a: a.Sequential(
            [a.HorizontalFlip(p=0.5), a.SmallestMaxSize(max_size=list(SHORTS), p=1.0)], p=1.0
        ),
        "a strong recipe": strong,
    }


def _has_albumentations() -> bool:
    try:
        importlib.import_module("albumentations")
    except ImportError:
        return False
    return True


def rows_of(name: str, times: dict[str, Timing]) -> list[Row]:
    """One row for each library that does it, or one without."""
    others = {side: time for side, time in times.items() if side != "ours"}
    ours = times["ours"]
    if not others:
        return [Row(name, IMAGES / ours.median, None, "images/s", spread=ours.spread)]
    return [
        Row(
            f"{name}, {side}", IMAGES / ours.median, IMAGES / time.median, "images/s",
            spread=max(ours.spread, time.spread),
        )
        for side, time in others.items()
    ]  # fmt: skip


def run() -> list[Row]:
    """The table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sides = Sides()
        torchvision, albumentations = _torchvision(), _albumentations() if _has_albumentations() else {}
        rows = []
        for name, transforms in OURS.items():
            runs = {"ours": sides.ours(transforms)}
            if name in torchvision:
                runs["torchvision"] = sides.torchvision(torchvision[name])
            if name in albumentations:
                runs["Albumentations"] = sides.albumentations(albumentations[name])
            rows += rows_of(name, alternate(runs, rounds=ROUNDS))
        return rows
    finally:
        torch.set_num_threads(threads)
