"""A model as an archive of ``torch.export``: a graph and its weights, run by torch without this package's code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from detr_ray.exporting.graphs import BatchGraph
from detr_ray.exporting.parity import Agreement, RunBatch, check_batches
from detr_ray.exporting.source import ExportSource
from detr_ray.exporting.tracing import BATCH_SHAPES, EXAMPLE_SIDES, traced
from detr_ray.model.exportable import exportable

METADATA_FILE = "detr_ray.json"
"""Name of the extra file in the archive that says what the model is."""


def write_torch_archive(source: ExportSource, path: Path) -> Agreement:
    """Writes the archive and compares what it gives, read from the file, with the model.

    Args:
        source: the model.
        path: the file.

    Raises:
        ExportError: the model cannot be traced, or the file's results are not the model's.
        OSError: the file cannot be written.
    """
    model = exportable(source.model)
    images = torch.zeros(2, 3, *EXAMPLE_SIDES)
    mask = torch.zeros(2, *EXAMPLE_SIDES, dtype=torch.bool)
    program = traced(source, BatchGraph(model), (images, mask), BATCH_SHAPES)
    content = {key: json.loads(value) for key, value in source.metadata().items()}
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(content, indent=1)})
    return check_batches(source, _run(path))


def _run(path: Path) -> RunBatch:
    """Calls the graph in an archive."""
    graph = torch.export.load(path).module()

    def run(images: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits, boxes_cxcywh = graph(torch.from_numpy(images), torch.from_numpy(mask))
        return logits.numpy(), boxes_cxcywh.numpy()

    return run
