"""Scores a checkpoint on a validation set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detr_ray.cli import run_command
from detr_ray.config import Config, ConfigError
from detr_ray.train import say

if TYPE_CHECKING:
    from detr_ray.evaluation import DetectionTable

DESCRIPTION = """Score a checkpoint on the validation set: COCO's 12 numbers, and the AP of each category.

eval.checkpoint names the checkpoint: a run's folder, a checkpoint in it, or DETR weights (path or URL)."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--detections", metavar="FILE", help="write all detections to this file, as COCO results")
    parser.add_argument("--picture", metavar="FILE", help="draw the first images with their boxes into this file (PNG)")
    parser.add_argument("--picture-images", metavar="N", type=int, default=12, help="images in the picture (12)")
    parser.add_argument("--picture-score", metavar="S", type=float, default=0.5, help="least score drawn (0.5)")


def _check(config: Config) -> None:
    if config.eval.checkpoint is None:
        raise ConfigError(
            "eval.checkpoint: is missing: give a run's folder, a checkpoint, or DETR weights (path or URL)"
        )


def _evaluate(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.runtime.launch import evaluate

    result = evaluate(config, say)
    say("\n" + result.metrics.table() + "\n\n" + result.metrics.category_table() + "\n")
    if arguments.json:
        content = {"checkpoint": result.checkpoint, "metrics": result.metrics.as_metrics("")}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
        say(f"numbers      {arguments.json}")
    if arguments.detections:
        result.detections.save_coco_results(arguments.detections)
        say(f"detections   {arguments.detections}")
    if arguments.picture:
        _draw(config, result.detections, arguments)
        say(f"picture      {arguments.picture}")
    return 0


def _draw(config: Config, detections: DetectionTable, arguments: argparse.Namespace) -> None:
    from detr_ray.data.images import ImageReader, decode_image
    from detr_ray.engine.job import open_evaluation_data
    from detr_ray.viz import DrawnBoxes, detection_grid

    index = open_evaluation_data(config.data, lambda line: None)
    reader, names = ImageReader(index), dict(index.categories)
    images, annotations, found = [], [], []
    for i in range(min(arguments.picture_images, len(index))):
        images.append(decode_image(reader.read(i), reader.name(i)).permute(1, 2, 0).numpy())
        rows = slice(index.first_box[i], index.first_box[i + 1])
        annotations.append(DrawnBoxes(index.boxes_xywh_px[rows], [names[c] for c in index.category_ids[rows].tolist()]))
        mine = (detections.image_ids == index.image_ids[i]) & (detections.scores >= arguments.picture_score)
        categories = [names[c] for c in detections.category_ids[mine].tolist()]
        found.append(DrawnBoxes(detections.boxes_xywh_px[mine], categories, detections.scores[mine]))
    detection_grid(images, annotations, found).save(arguments.picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.evaluate``."""
    return run_command("evaluate", DESCRIPTION, _evaluate, argv, add_arguments=_arguments, check=_check)


if __name__ == "__main__":
    sys.exit(main())
