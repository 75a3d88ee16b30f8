"""Scores a checkpoint on a validation set."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_FAILED, count, run_command, say, share, usage, with_model, write_result
from detr_ray.config import Config
from detr_ray.progress_bar import ProgressBar

if TYPE_CHECKING:
    from detr_ray.engine.validation.evaluation_job import EvaluationJob, EvaluationResult

DESCRIPTION = """Score a checkpoint on the validation set: COCO's 12 numbers, and the AP of each category.

MODEL is a run's folder, a checkpoint in it, a model package, a registered model (models:/NAME@ALIAS), or weights of a
published model (path or URL); without it, eval.checkpoint names it. Image sizes, precision and data that are not given
are those of the run."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("[MODEL]")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the model; left out: eval.checkpoint")
    parser.add_argument("--json", metavar="FILE", type=_file, help="write the numbers to this file")
    parser.add_argument(
        "--detections", metavar="FILE", type=_file, help="write all detections to this file, as COCO results"
    )
    parser.add_argument(
        "--scores", metavar="FILE", type=_file,
        help="write precision, recall, F1 and best threshold of each category to this file (JSON)",
    )  # fmt: skip
    parser.add_argument(
        "--picture", metavar="FILE", type=_file, help="draw the first images with their boxes into this file (PNG)"
    )
    parser.add_argument(
        "--picture-images", metavar="N", type=count, default=12, help="number of images in the picture (default 12)"
    )
    parser.add_argument(
        "--picture-score",
        metavar="S",
        type=share,
        default=0.5,
        help="lowest score that is drawn, from 0 to 1 (default 0.5)",
    )


def _file(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a file")
    return text


def _evaluate(config: Config, arguments: argparse.Namespace) -> int:
    config = with_model(config, arguments.model)
    config.checkpoint_to_evaluate()  # refused before modules are imported that take seconds

    from detr_ray.engine.preflight.writing import check_outputs

    if arguments.picture:
        from detr_ray.viz import check_picture

        check_picture(arguments.picture, arguments.picture_images)
    given = {
        "--json": arguments.json,
        "--detections": arguments.detections,
        "--scores": arguments.scores,
        "--picture": arguments.picture,
    }
    check_outputs({option: location for option, location in given.items() if location is not None})

    from detr_ray.engine.validation.evaluation_job import prepare_evaluation
    from detr_ray.model_sources import with_located_model

    with with_located_model(config) as at_hand:
        job = prepare_evaluation(at_hand, say)

    from detr_ray.evaluation import describe_scores
    from detr_ray.runtime.launch import run_prepared_evaluation

    with ProgressBar("image") as bar:
        bar.begin(job.num_images)
        result = run_prepared_evaluation(job, bar.say, bar.update)
    say("\n" + result.metrics.table() + "\n\n" + result.metrics.category_table() + "\n")
    say(describe_scores(result.metrics.scores) + "\n")
    contents: dict[str, Callable[[], bytes]] = {
        "--json": lambda: _numbers(job, result),
        "--detections": result.detections.coco_results_json,
        "--scores": lambda: _scores(job, result),
        "--picture": lambda: _picture(job, result, arguments),
    }
    written = [
        write_result(option, location, contents[option], option.removeprefix("--"))
        for option, location in given.items()
        if location is not None
    ]
    return 0 if all(written) else EXIT_FAILED


def _numbers(job: EvaluationJob, result: EvaluationResult) -> bytes:
    content = {"checkpoint": result.checkpoint, "settings": job.settings, "metrics": result.metrics.as_metrics("")}
    return (json.dumps(content, indent=1) + "\n").encode()


def _scores(job: EvaluationJob, result: EvaluationResult) -> bytes:
    content = {"checkpoint": result.checkpoint, "measured_on": job.data.measured_on, **result.metrics.scores}
    return (json.dumps(content, indent=1) + "\n").encode()


def _picture(job: EvaluationJob, result: EvaluationResult, arguments: argparse.Namespace) -> bytes:
    from detr_ray.engine.pictures.images import StoredPixels
    from detr_ray.viz import DrawnBoxes, detection_grid, picture_format

    index, detections = job.data.val, result.detections
    assert index is not None, "there is a validation set"
    names = job.names
    annotations, found = [], []
    for i in range(min(arguments.picture_images, len(index))):
        rows = slice(index.first_box[i], index.first_box[i + 1])
        annotations.append(DrawnBoxes(index.boxes_xywh_px[rows], [names[c] for c in index.category_ids[rows].tolist()]))
        shown = (detections.image_ids == index.image_ids[i]) & (detections.scores >= arguments.picture_score)
        categories = [names[c] for c in detections.category_ids[shown].tolist()]
        found.append(DrawnBoxes(detections.boxes_xywh_px[shown], categories, detections.scores[shown]))
    file = io.BytesIO()
    pixels = StoredPixels(index)
    grid = detection_grid((pixels.read(row) for row in range(len(found))), annotations, found)
    for reason in pixels.unreadable.values():
        say(f"WARNING: black in the picture: {reason}")
    grid.save(file, format=picture_format(arguments.picture))
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.evaluate``."""
    return run_command("evaluate", DESCRIPTION, _evaluate, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
