"""A model as an ONNX file: for batches of normalised, padded images, or for a single image.

The graph is exported by torch (``torch.onnx`` with ``torch.export``). For single images, the resizing before it is
written in ONNX operators: the size of its result depends on the image's shape by comparisons and rounding, which cannot
be traced. The packages of the extra ``export`` are imported where they are used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from detr_ray.config import ConfigError
from detr_ray.exporting.errors import ExportError
from detr_ray.exporting.graphs import BatchGraph, ImageGraph
from detr_ray.exporting.onnx_resizing import resizing_graph
from detr_ray.exporting.parity import Agreement, check_batches, check_images
from detr_ray.exporting.source import ExportSource
from detr_ray.exporting.tracing import BATCH_SHAPES, EXAMPLE_SIDES, OPEN, traced
from detr_ray.model.exportable import exportable
from detr_ray.retries import reason_of

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""Version of ONNX's operators: the first whose Resize has antialiasing."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages(option: str) -> None:
    """Checks that the needed packages are installed.

    Raises:
        ConfigError: names them, and the extra that brings them.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{option}: needs {', '.join(missing)}: pip install 'detr_ray[export]'")


def write_batch_onnx(source: ExportSource, path: Path) -> Agreement:
    """Writes the model on batches: ``images``, ``mask`` -> ``pred_logits``, ``pred_boxes``.

    Args:
        source: the model.
        path: the file; it is compared with the model as onnxruntime reads it.

    Raises:
        ExportError: the model cannot be exported, or the file's results are not the model's.
        OSError: the file cannot be written.
    """
    examples = (torch.zeros(2, 3, *EXAMPLE_SIDES), torch.zeros(2, *EXAMPLE_SIDES, dtype=torch.bool))
    graph = BatchGraph(exportable(source.model))
    model = _converted(source, graph, examples, BATCH_SHAPES, ("pred_logits", "pred_boxes"))
    _save(source, model, path)
    session = _session(path)

    def run(images: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes_cxcywh = session.run(None, {"images": images, "mask": mask})
        return logits, boxes_cxcywh

    return check_batches(source, run)


def write_image_onnx(source: ExportSource, path: Path) -> Agreement:
    """Writes the detector on one image: ``image`` [H, W, 3] uint8 RGB -> ``boxes``, ``scores``, ``labels``.

    Resizing, normalisation and post-processing to pixel boxes are part of it. See `write_batch_onnx`.
    """
    from onnx import compose

    examples = (torch.zeros(1, 3, *EXAMPLE_SIDES, dtype=torch.uint8), torch.tensor(EXAMPLE_SIDES))
    graph = ImageGraph(exportable(source.model), source.class_loss, source.max_detections)
    outputs = ("boxes", "scores", "labels")
    detector = _converted(source, graph, examples, {"resized": {2: OPEN, 3: OPEN}, "size": {}}, outputs)
    resizing = resizing_graph(source.size, source.max_size, OPSET, detector.ir_version)
    model = compose.merge_models(resizing, detector, io_map=[("image_resized", "resized"), ("image_size", "size")])
    _save(source, model, path)
    session, first_part = _session(path), _session(resizing.SerializeToString())

    def run(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, scores, labels = session.run(list(outputs), {"image": image})
        return boxes, scores, labels

    def resize(image: np.ndarray) -> np.ndarray:
        (pixels,) = first_part.run(["image_resized"], {"image": image})
        return pixels

    return check_images(source, run, resize)


def _converted(
    source: ExportSource,
    graph: nn.Module,
    examples: tuple[Tensor, ...],
    shapes: dict[str, Any],
    outputs: tuple[str, ...],
) -> onnx.ModelProto:
    import onnx

    program = traced(source, graph, examples, shapes)
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                input_names=list(shapes),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # it drops bounds of clamps that are still in use; runtimes optimize when they load
                verbose=False,
            )
            assert converted is not None, "no file was named"
            model: onnx.ModelProto = converted.model_proto
            onnx.checker.check_model(model)
    except Exception as error:  # as in tracing
        raise ExportError(f"{source.architecture} cannot be exported to ONNX: {reason_of(error)}") from error
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the converter's output, log lines and warnings; errors are raised."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _save(source: ExportSource, model: onnx.ModelProto, path: Path) -> None:
    """Writes the file with the model's metadata."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, source.metadata())
    path.write_bytes(model.SerializeToString())


def _session(model: Path | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of constants that it computes at each call
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
