"""Models as files for use without this package: ONNX, archives of ``torch.export``, weights under published names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from detr_ray.exporting.errors import ExportError
from detr_ray.exporting.onnx_file import check_packages, write_batch_onnx, write_image_onnx
from detr_ray.exporting.parity import Agreement
from detr_ray.exporting.published_file import write_published_file
from detr_ray.exporting.source import ExportSource
from detr_ray.exporting.torch_archive import write_torch_archive

__all__ = ["FORMATS", "Agreement", "ExportError", "ExportFormat", "ExportSource", "export"]


@dataclass(frozen=True)
class ExportFormat:
    """A kind of file that models are exported to.

    Attributes:
        write: writes a model into a file, and compares what it gives with the model.
        suffix: how names of such files end.
        needs_onnx: whether it needs the packages of the extra ``export``.
        usage: what it takes and gives, for users.
    """

    write: Callable[[ExportSource, Path], Agreement]
    suffix: str
    needs_onnx: bool
    usage: str


_BATCHES = (
    "takes images (float [B, 3, H, W], normalised) and mask (bool [B, H, W], true on padding), "
    "gives pred_logits and pred_boxes"
)
FORMATS = {
    "onnx": ExportFormat(write_batch_onnx, ".onnx", True, f"an onnxruntime.InferenceSession that {_BATCHES}"),
    "onnx-image": ExportFormat(
        write_image_onnx, ".onnx", True,
        "an onnxruntime.InferenceSession that takes image (uint8 [H, W, 3], RGB, upright), gives boxes (pixels: left, "
        "top, right, bottom), scores and labels; the names of the labels are in its metadata",
    ),
    "torch": ExportFormat(write_torch_archive, ".pt2", False, f"torch.export.load(FILE).module() {_BATCHES}"),
    "published": ExportFormat(write_published_file, ".pth", False, "torch.load(FILE)['model'] is the state dict"),
}  # fmt: skip
"""Value of ``--to`` -> format."""


def export(source: ExportSource, to: str, keep: Callable[[bytes], None]) -> Agreement:
    """Exports a model; the file is kept only if it gives what the model gives.

    Args:
        source: the model.
        to: a key of `FORMATS`.
        keep: gets the file's content once it has been compared.

    Returns:
        How well the file agrees with the model.

    Raises:
        ExportError: the model cannot be exported, or the file's results are not the model's.
        ConfigError: packages are missing.
    """
    kind = FORMATS[to]
    if kind.needs_onnx:
        check_packages(f"--to {to}")
    with tempfile.TemporaryDirectory(prefix="detr_ray-export-") as folder:
        path = Path(folder, f"model{kind.suffix}")
        agreement = kind.write(source, path)
        keep(path.read_bytes())
    return agreement
