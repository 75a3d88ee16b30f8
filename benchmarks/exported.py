"""Exported models in their runtimes, against the model in torch: images/s on the CPU, and how far results are apart.

    python -m benchmarks exported

DETR with a ResNet-50 and Deformable DETR, on one and two images of 512 x 683, in onnxruntime and as an archive of
torch.export. Weights are random; all runtimes get the same threads. Needs the extra ``export``.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, SkippedBenchmark, alternate
from detr_ray.config import load_config
from detr_ray.data.label_map import LabelMap
from detr_ray.detector import build_detector
from detr_ray.exporting import FORMATS, ExportSource

HEIGHT, WIDTH = 512, 683
MODELS = {"DETR R50": (), "Deformable DETR R50": ("model.architecture=deformable_detr",)}


def source(overrides: tuple[str, ...]) -> ExportSource:
    """A published architecture with random weights."""
    torch.manual_seed(0)
    config = load_config(None, ["model.backbone_weights=none", *overrides])
    detector = build_detector(config.model, config.loss, 91)
    return ExportSource(
        model=detector.model.eval(),
        class_loss=detector.criterion.class_loss,
        label_map=LabelMap.coco91(),
        architecture=config.model.architecture,
        size=config.eval.size,
        max_size=config.eval.max_size,
        max_detections=config.eval.max_detections,
        name="random weights",
        step=None,
        weights_sha256="",
    )


def run() -> list[Row]:
    """Each model in each runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise SkippedBenchmark(f"{error}: pip install 'detr_ray[export]'") from error
    rows = []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for name, overrides in MODELS.items():
        given = source(overrides)
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder, kind + FORMATS[kind].suffix) for kind in ("onnx", "torch")}
            agreed = {kind: FORMATS[kind].write(given, path) for kind, path in paths.items()}
            session = onnxruntime.InferenceSession(str(paths["onnx"]), options, providers=["CPUExecutionProvider"])
            archive = torch.export.load(paths["torch"]).module()
            sizes = {kind: os.path.getsize(path) / 1e6 for kind, path in paths.items()}  # noqa: PTH202
        for batch in (1, 2):
            images = torch.randn(batch, 3, HEIGHT, WIDTH)
            mask = torch.zeros(batch, HEIGHT, WIDTH, dtype=torch.bool)
            feed = {"images": images.numpy(), "mask": mask.numpy()}
            runs: dict[str, Any] = {
                "eager": functools.partial(given.model, images, mask),
                "onnx": functools.partial(session.run, None, feed),
                "torch": functools.partial(archive, images, mask),
            }
            with torch.inference_mode():
                times = alternate(runs, rounds=3)
            eager = batch / times["eager"].median
            for kind, runtime in (("onnx", "onnxruntime"), ("torch", "torch.export")):
                agreement = agreed[kind]
                rows.append(
                    Row(
                        f"{name} {batch}x{HEIGHT}x{WIDTH}, {runtime} / eager torch",
                        ours=batch / times[kind].median,
                        baseline=eager,
                        unit="images/s",
                        note=f"differs by {agreement.difference:.1e} at most ({agreement.tried}); {sizes[kind]:.0f} MB",
                        spread=max(times[kind].spread, times["eager"].spread),
                    )
                )
    return rows
