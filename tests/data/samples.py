"""Plans for tests, small enough to be quick, and sizes of images by their headers."""

from __future__ import annotations

import numpy as np
from defaults import augmentation

from detr_ray.data.augmentation import DetrAugmentation
from detr_ray.data.image_headers import ImageHeader, read_header
from detr_ray.data.images import ImageReader
from detr_ray.data.index import DatasetIndex
from detr_ray.data.planner import Planner
from detr_ray.data.sample import SamplePlan

COMMON_SIZES = np.array([[480, 640], [640, 480], [427, 640], [640, 427], [500, 375], [333, 500], [612, 612]])
SMALL = augmentation(scales=(64, 80, 96), max_size=160, crop_scales=(50, 60), crop_min=40, crop_max=60)


def walk(planner: Planner, steps: int) -> list[tuple[SamplePlan, ...]]:
    """The first steps of a stream."""
    return [planner.global_batch(step) for step in range(steps)]


def training_plans(index: DatasetIndex, seed: int = 0, values: DetrAugmentation = SMALL) -> list[SamplePlan]:
    """One plan for each image of the index, in its order."""
    uniform = np.random.default_rng(seed).random((len(index), 8))
    drawn = values.draw(np.stack([index.heights, index.widths], axis=1), uniform)
    return [
        SamplePlan(100 + i, i, image_id, (size[0], size[1]), steps)
        for i, (image_id, size, steps) in enumerate(
            zip(index.image_ids.tolist(), drawn.size.tolist(), drawn.steps(np.arange(len(index))), strict=True)
        )
    ]


def plain_plan(index: DatasetIndex, i: int, **changes: object) -> SamplePlan:
    """A plan that leaves image ``i`` as it is, but for the changes."""
    values = {"position": i, "index": i, "size": (int(index.heights[i]), int(index.widths[i]))} | changes
    return SamplePlan(image_id=int(index.image_ids[i]), **values)


def read_image_size(data: bytes, name: str, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of what decoding would give, by the header alone; ``size`` is the annotations'."""
    return _size(read_header(data, name), name, size)


def read_size(reader: ImageReader, i: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The same for an image of a data set."""
    return _size(reader.read_header(i), reader.name(i), size)


def _size(header: ImageHeader, name: str, size: tuple[int, int] | None) -> tuple[int, int]:
    return header.upright if header.turn(name, size) else header.stored
