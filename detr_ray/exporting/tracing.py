"""Traces a module with ``torch.export``, with dynamic sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detr_ray.exporting.errors import ExportError
from detr_ray.exporting.source import ExportSource
from detr_ray.retries import reason_of

EXAMPLE_SIDES = (192, 256)
"""Height and width in pixels of the traced images; the graph does not depend on them."""


OPEN = torch.export.Dim.DYNAMIC
"""A dynamic size within the bounds that torch infers, because torch treats a map of one cell specially."""

BATCH_SHAPES = {"images": {0: OPEN, 2: OPEN, 3: OPEN}, "mask": {0: OPEN, 1: OPEN, 2: OPEN}}
"""The dynamic sizes of images and mask."""


def traced(
    source: ExportSource, module: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, Any]
) -> torch.export.ExportedProgram:
    """Traces a module.

    Args:
        source: the model, for messages.
        module: takes and gives tensors.
        inputs: examples.
        shapes: name of each input -> its dynamic axes.

    Raises:
        ExportError: the module does something that depends on values, or that exporters do not know.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    except Exception as error:  # tracing can raise any exception
        raise ExportError(f"{source.architecture} cannot be traced by torch: {reason_of(error)}") from error
