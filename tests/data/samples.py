"""Plans for the tests of loading: real draws of the training augmentation, and sizes small enough to be quick."""

from __future__ import annotations

import numpy as np

from detr_ray.data.augmentation import AugmentValues, draw
from detr_ray.data.index import CocoIndex
from detr_ray.structures import SamplePlan

SMALL = AugmentValues(scales=(64, 80, 96), max_size=160, crop_scales=(50, 60), crop_min=40, crop_max=60)


def training_plans(index: CocoIndex, seed: int = 0, values: AugmentValues = SMALL) -> list[SamplePlan]:
    """One plan for each image of the index, in its order."""
    uniform = np.random.default_rng(seed).random((len(index), 8))
    drawn = draw(np.stack([index.heights, index.widths], axis=1), uniform, values)
    plans = []
    for i, crop in enumerate(drawn.crop.tolist()):
        plans.append(
            SamplePlan(
                position=100 + i,
                index=i,
                image_id=int(index.image_ids[i]),
                flip=bool(drawn.flip[i]),
                resize=tuple(drawn.resize[i].tolist()) if crop[2] else None,
                crop=tuple(crop) if crop[2] else None,
                size=tuple(drawn.size[i].tolist()),
            )
        )
    return plans


def plain_plan(index: CocoIndex, i: int, **changes: object) -> SamplePlan:
    """A plan that leaves image ``i`` as it is, but for the changes."""
    size = (int(index.heights[i]), int(index.widths[i]))
    values = {"position": i, "index": i, "flip": False, "resize": None, "crop": None, "size": size} | changes
    return SamplePlan(image_id=int(index.image_ids[i]), **values)
