"""Small data sets on disk for tests: images of noise, boxes where the test wants them, faults of all kinds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (48, 64)
"""Height and width in pixels of every image that is not made otherwise."""

CATEGORIES = ((1, "cat"), (2, "dog"))

Box = tuple[int, float, float, float, float]
"""Category id, left, top, width, height."""


def encoded(
    image_format: str = "JPEG",
    mode: str = "RGB",
    size: tuple[int, int] = SIZE,
    orientation: int | None = None,
    seed: int = 0,
) -> bytes:
    """An image file of noise; ``size`` is as stored."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    options: dict[str, Any] = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).convert(mode).save(file, image_format, **options)
    return file.getvalue()


class CocoFolder:
    """A data set in COCO's layout that grows image by image; `write` makes its annotation files."""

    def __init__(self, root: Path, categories: Sequence[tuple[int, str]] = CATEGORIES) -> None:
        self.root = root
        self.categories = {"train": tuple(categories), "val": tuple(categories)}
        self.images: dict[str, list[dict]] = {"train": [], "val": []}
        self.annotations: dict[str, list[dict]] = {"train": [], "val": []}

    def add(
        self,
        split: str,
        name: str,
        content: bytes | None,
        size: tuple[int, int] = SIZE,
        boxes: Sequence[Box] = ((1, 4, 4, 20, 20), (2, 30, 8, 16, 24)),
    ) -> Path:
        """Adds an image that the annotations say is of ``size``; without content its file is missing."""
        path = self.root / f"{split}2017" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        image_id = len(self.images[split]) + (1 if split == "train" else 1001)
        self.images[split].append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for category_id, *box in boxes:
            self.annotations[split].append(
                {
                    "id": len(self.annotations[split]) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        return path

    def fill(self, split: str, count: int, prefix: str = "good") -> None:
        """Adds so many sound images, each other noise."""
        for number in range(count):
            seed = number + (1000 if split == "val" else 0)
            self.add(split, f"{prefix}{number:03d}.jpg", encoded(seed=seed))

    def write(self) -> Path:
        """Writes the annotation files; gives back the data set's folder."""
        folder = self.root / "annotations"
        folder.mkdir(exist_ok=True, parents=True)
        for split, images in self.images.items():
            content = {
                "images": images,
                "annotations": self.annotations[split],
                "categories": [{"id": i, "name": name} for i, name in self.categories[split]],
            }
            (folder / f"instances_{split}2017.json").write_text(json.dumps(content))
        return self.root


def sound_folder(root: Path, num_train: int = 12, num_val: int = 4) -> Path:
    """A data set without a fault."""
    folder = CocoFolder(root)
    folder.fill("train", num_train)
    folder.fill("val", num_val)
    return folder.write()
