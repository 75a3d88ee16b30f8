"""The known architectures. A new one needs a file beside ``model/detr.py`` and a line here."""

from __future__ import annotations

ARCHITECTURES = {
    "detr": "detr_ray.model.detr:Detr.from_config",
}
"""Value of ``model.architecture`` -> ``module:function`` that builds the model from the ``model`` section and the
number of classes. The function is not imported here, so that reading a configuration does not import torch."""
