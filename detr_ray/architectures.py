"""The known architectures. A new one needs a file beside ``model/detr.py`` and a line in each table here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ARCHITECTURES = {
    "detr": "detr_ray.model.detr:Detr.from_config",
    "deformable_detr": "detr_ray.model.deformable_detr:DeformableDetr.from_config",
    "dino": "detr_ray.model.dino:Dino.from_config",
}
"""Value of ``model.architecture`` -> ``module:function`` that builds the model from the ``model`` section and the
number of classes. The function is not imported here, so that reading a configuration does not import torch."""

PUBLISHED: dict[str, dict[str, Mapping[str, Any]]] = {
    "detr": {
        "model": {"position_temperature": 10000.0, "position_offset": 0.0},
        "loss": {"class_loss": "softmax"},
    },
    "deformable_detr": {
        "model": {
            "dim_feedforward": 1024,
            "num_queries": 300,
            "num_feature_levels": 4,
            "encoder_points": 4,
            "decoder_points": 4,
            "box_refine": False,
            "two_stage": False,
            "mixed_query_selection": False,
            "look_forward_twice": False,
            "one_to_many_queries": 0,
            "one_to_many_copies": 6,
            "position_temperature": 10000.0,
            "position_offset": -0.5,
        },
        "loss": {"class_loss": "focal", "cost_class": 2.0, "ce": 2.0},
    },
    "dino": {
        "model": {
            "dropout": 0.0,
            "num_queries": 900,
            "num_feature_levels": 4,
            "encoder_points": 4,
            "decoder_points": 4,
            "denoising_queries": 100,
            "denoising_label_noise": 0.5,
            "denoising_box_noise": 1.0,
            "position_temperature": 20.0,
            "position_offset": 0.0,
        },
        "loss": {"class_loss": "focal", "cost_class": 2.0},
        "eval": {"max_detections": 300},
    },
}
"""Value of ``model.architecture`` -> section -> values of the published model, where they are not the section's
defaults. Keys of one architecture alone are listed here and null elsewhere."""


class FromScratch(NamedTuple):
    """Training images, with repetitions, that a detector from random weights needs before it finds much.

    Attributes:
        photographs: as large as usual.
        small: simple images whose short side has 240 pixels at most.
    """

    photographs: int
    small: int


FROM_SCRATCH = {
    # About eight epochs of COCO; on generated images of 64 pixels AP 0.1 after 16,000 images, 0.4 after 32,000.
    "detr": FromScratch(1_000_000, 30_000),
    # The published models took a tenth of DETR's epochs on COCO. Two stages on generated images of 96 to 128 pixels: AP
    # 0.15 after 2,500 images, 0.35 after 10,000; on drawn blood cells of 192 to 240 pixels (configs/own_data.yaml, 13
    # objects an image) 0.57 after 1,230, 0.71 after 4,920.
    "deformable_detr": FromScratch(100_000, 4_000),
    # Measured: on 250 drawn images of 96 to 128 pixels AP 0.08 after 2,500, as two-stage Deformable DETR in the same
    # schedule; 126 photographs at 128 pixels by heart: 0.03 to 0.27 after 5,000, two-stage Deformable DETR 0.4.
    "dino": FromScratch(100_000, 4_000),
}
"""Value of ``model.architecture`` -> what it needs; the check command compares it with the length of a training."""


def published_values(cfg_model: Any) -> dict[str, Any]:
    """The published values of a ``model`` section's architecture, with those of the section that are set."""
    published = PUBLISHED[getattr(cfg_model, "architecture", "detr")]["model"]
    given = {name: getattr(cfg_model, name, None) for name in published}
    return {**published, **{name: value for name, value in given.items() if value is not None}}
