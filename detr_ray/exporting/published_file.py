"""A model's weights in a torch file with published names, for the original implementations."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from detr_ray.exporting.parity import Agreement, check_batches
from detr_ray.exporting.source import ExportSource
from detr_ray.model import load_published, published_state_dict


def write_published_file(source: ExportSource, path: Path) -> Agreement:
    """Writes ``{"model": state dict}``, loads it into another model, and compares the results.

    Args:
        source: the model.
        path: the file.

    Raises:
        ExportError: the file's results are not the model's.
        OSError: the file cannot be written.
    """
    state = {name: value.detach().cpu().clone() for name, value in published_state_dict(source.model).items()}
    torch.save({"model": state}, path)
    other = copy.deepcopy(source.model).eval()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    load_published(other, torch.load(path, weights_only=True)["model"])

    def run(images: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            output = other(torch.from_numpy(images), torch.from_numpy(mask))
        return output["pred_logits"].numpy(), output["pred_boxes"].numpy()

    return check_batches(source, run)
