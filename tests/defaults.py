"""Parts of the data as the configuration's defaults make them, for tests that change a few values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from detr_ray.config import AugmentConfig, GenerateConfig
from detr_ray.data.augmentation import DetrAugmentation
from detr_ray.data.generated import DrawingParameters, generate_dataset
from detr_ray.data.transforms.sequence import Entry, Transform, TransformSequence


def augmentation(**changes: Any) -> DetrAugmentation:
    """The training augmentation."""
    return replace(DetrAugmentation(**AugmentConfig().model_dump(exclude={"transforms"})), **changes)


def sequence_of(*transforms: Transform) -> TransformSequence:
    """A sequence of transforms that are done to every sample."""
    return TransformSequence(tuple(Entry(transform) for transform in transforms))


def size_policy(**changes: Any) -> TransformSequence:
    """The same as a planner takes it."""
    return sequence_of(augmentation(**changes))


def draw_shapes(root: Path, progress: Callable[[int, int], None] | None = None, **changes: Any) -> None:
    """Draws a data set into a folder, or finds it there."""
    generate_dataset(root, replace(DrawingParameters(**GenerateConfig().model_dump()), **changes), progress)
