"""The architectures that there are. A new one is a file beside ``model/detr.py`` and a line here."""

from __future__ import annotations

ARCHITECTURES = {
    "detr": "detr_ray.model.detr:Detr.from_config",
}
"""What ``model.architecture`` may be, and what builds the model of a ``model`` section for a number of classes.
It is named by its place, so that reading a configuration does not import torch."""
