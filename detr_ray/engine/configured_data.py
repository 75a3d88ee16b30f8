"""Opens the data that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from detr_ray.config import DataConfig
from detr_ray.data.formats import Reading, open_split
from detr_ray.data.holdout import Holdout
from detr_ray.data.index import DatasetIndex


def open_configured(data: DataConfig, split: str, progress: Callable[[int, int], None] | None = None) -> DatasetIndex:
    """Opens a split from where the configuration says, whole and without looking at more than its annotations.

    Args:
        data: the configuration.
        split: ``train`` or ``val``.
        progress: told of the images whose size was read, and of all, where annotations do not state sizes.

    Raises:
        DataError: it cannot be read, or is not what it should be.
    """
    return open_split(
        data.root,
        data.places(split),
        split,
        data.follow_links,
        data_format=data.format,
        holdout=None if data.split is None else Holdout(**data.split.model_dump()),
        reading=Reading(data.on_bad_image == "skip", progress),
    )
