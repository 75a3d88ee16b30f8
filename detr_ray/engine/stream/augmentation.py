"""The augmentation that a configuration asks for.

A line of the table for each transform of ``data.augment.transforms``: its section, and what it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detr_ray.config import AugmentConfig
from detr_ray.config import transform_sections as sections
from detr_ray.data.augmentation import DetrAugmentation
from detr_ray.data.transforms.colour import Blur, Grayscale, Jpeg, Photometric
from detr_ray.data.transforms.cutout import CutOut
from detr_ray.data.transforms.geometry import IouCrop, Mirror, Rotate90, ScaleJitter, ZoomOut
from detr_ray.data.transforms.sequence import Entry, Transform, TransformSequence
from detr_ray.data.transforms.several import CopyPaste, Mixup, Mosaic

_TRANSFORMS: Mapping[type[sections.TransformSection], Callable[..., Transform]] = {
    sections.PhotometricTransform: Photometric,
    sections.GrayscaleTransform: Grayscale,
    sections.BlurTransform: Blur,
    sections.JpegTransform: Jpeg,
    sections.HorizontalFlipTransform: lambda: Mirror(1),
    sections.VerticalFlipTransform: lambda: Mirror(0),
    sections.Rotate90Transform: Rotate90,
    sections.ZoomOutTransform: ZoomOut,
    sections.IouCropTransform: IouCrop,
    sections.ScaleJitterTransform: ScaleJitter,
    sections.CutoutTransform: CutOut,
    sections.MosaicTransform: Mosaic,
    sections.MixupTransform: Mixup,
    sections.CopyPasteTransform: CopyPaste,
}


def augmentation_of(augment: AugmentConfig) -> TransformSequence:
    """The augmentation that the section ``data.augment`` asks for."""
    return TransformSequence(tuple(_entry(transform, augment) for transform in augment.transforms))


def _entry(section: sections.TransformSection, augment: AugmentConfig) -> Entry:
    if isinstance(section, sections.DetrTransform):
        return Entry(DetrAugmentation(**_values(augment, "transforms")))
    made = _TRANSFORMS[type(section)](**_values(section, "p", "until_epoch"))
    return Entry(made, getattr(section, "p", 1.0), getattr(section, "until_epoch", None))


def _values(section: sections.TransformSection | AugmentConfig, *without: str) -> dict[str, Any]:
    """The values of a section's keys, without some."""
    return {name: getattr(section, name) for name in type(section).model_fields if name not in without}
