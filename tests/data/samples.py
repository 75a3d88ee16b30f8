"""Plans for the tests of loading: real draws of the training augmentation, and sizes small enough to be quick."""

from __future__ import annotations

import numpy as np
from defaults import augmentation

from detr_ray.data.augmentation import DetrAugmentation
from detr_ray.data.index import DatasetIndex
from detr_ray.data.sample import SamplePlan

SMALL = augmentation(scales=(64, 80, 96), max_size=160, crop_scales=(50, 60), crop_min=40, crop_max=60)


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
