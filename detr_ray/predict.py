"""Finds objects on images with a trained model: on any number of them, here or on a cluster."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import count, run_command, say, share, usage
from detr_ray.config import Config, ConfigError
from detr_ray.printable import counted

if TYPE_CHECKING:
    from detr_ray.prediction import LoadedModel
    from detr_ray.prediction.job import PredictionJob
    from detr_ray.prediction.results import ResultFolder

DESCRIPTION = """Find objects on images with a trained model, and write what was found into a folder.

MODEL is a run's folder (its best checkpoint), a checkpoint, a model package, a registered model (models:/NAME@ALIAS),
or DETR weights (path or URL); left out, it is eval.checkpoint. Images are files, folders, patterns ('photos/*.jpg'),
addresses in a bucket, a folder of shards, or a COCO file with --root. Image sizes, precision and numbers of detections
that are not given are the model's.

The same command again goes on where it was interrupted. An image that cannot be read is listed and left out.
prediction.json in the folder says whether all is there."""

_FORMATS = ("coco", "parquet", "csv", "pictures")
PART_IMAGES = 256
PICTURE_SCORE = 0.5
"""Lowest score that is drawn where the user gives no score at all."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("[MODEL] --images IMAGES... --out FOLDER")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the model; left out: eval.checkpoint")
    parser.add_argument(
        "--images", metavar="IMAGES", nargs="+", help="files, folders, patterns, a COCO file, or shards"
    )
    parser.add_argument(
        "--root", metavar="FOLDER", help="the folder that the file names in a COCO file are relative to"
    )
    parser.add_argument("--out", metavar="FOLDER", help="the folder of the results, a path or URI")
    parser.add_argument(
        "--to", metavar="FORMATS", type=_formats, default=("coco",),
        help="what is written, separated by commas: coco (results.json), parquet, csv, pictures (default coco)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", metavar="S", type=_threshold,
        help="lowest score that is kept, from 0 to 1, or best_f1 for the best one of each category (default: all)",
    )  # fmt: skip
    parser.add_argument("--top-k", metavar="N", type=count, help="most objects an image (default eval.max_detections)")
    parser.add_argument(
        "--scores", metavar="FILE", help="what evaluate --scores wrote, for best_f1 of weights that lack it"
    )
    parser.add_argument(
        "--picture-score", metavar="S", type=share,
        help=f"lowest score that is drawn (default: all that --threshold keeps, or {PICTURE_SCORE:g} without it)",
    )  # fmt: skip
    parser.add_argument(
        "--part-images", metavar="N", type=count, default=PART_IMAGES,
        help=f"images whose results are written together; at most these are done again (default {PART_IMAGES})",
    )  # fmt: skip


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in _FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} cannot be written; there are {', '.join(_FORMATS)}")
    return names


def _threshold(text: str) -> float | str:
    if text == "best_f1":
        return text
    try:
        return share(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, or best_f1 (got {text})") from None


def _predict(config: Config, arguments: argparse.Namespace) -> int:
    missing = [f"--{name}: is missing" for name in ("images", "out") if not getattr(arguments, name)]
    if missing:
        raise ConfigError(missing)
    source = arguments.model or config.eval.checkpoint
    if source is None:
        raise ConfigError("MODEL is missing: name it before --images, which takes all that follows it as images")

    from detr_ray.addresses import check_address
    from detr_ray.engine.prediction_job import Wanted, prepare_prediction
    from detr_ray.model_sources import load_model
    from detr_ray.prediction.results import ResultFolder
    from detr_ray.prediction.thresholds import ThresholdError

    check_address(arguments.out)
    wanted = Wanted(arguments.images, arguments.root, arguments.threshold, arguments.top_k, arguments.part_images)
    try:
        model = load_model(source, config, arguments.scores, say)
        job = prepare_prediction(model, config, wanted, say)
    except ThresholdError as error:
        raise ConfigError(f"--{error}") from error
    folder = ResultFolder(arguments.out, job)
    parts = folder.open()
    done = len(job.parts) - len(parts)
    what = f"{counted(len(job.index), 'image')} in {counted(len(job.parts), 'part')}"
    say(what + (f", of which {done} {'is' if done == 1 else 'are'} done" if done else ""))
    _predict_parts(job, model, folder, parts, config)
    return _finish(job, folder, arguments)


def _predict_parts(
    job: PredictionJob, model: LoadedModel, folder: ResultFolder, parts: list[int], config: Config
) -> None:
    from detr_ray.engine.context import local_device
    from detr_ray.engine.prediction_job import predict_here, write_parts
    from detr_ray.runtime.cluster_address import needs_no_ray

    if not parts:
        return
    device = local_device(config.train.use_gpu) if needs_no_ray(config, len(job.index)) else None
    with _writing_to(folder):
        if device is not None:
            write_parts(job, folder, parts, lambda numbers: predict_here(job, model, numbers, device), say)
            return
        from detr_ray.runtime.prediction import predict_on_cluster
        from detr_ray.runtime.session import session_of

        with session_of(config):
            write_parts(job, folder, parts, lambda numbers: predict_on_cluster(job, numbers, config), say)


@contextlib.contextmanager
def _writing_to(folder: ResultFolder) -> Iterator[None]:
    """Turns storage errors into errors that name the option; says how to go on."""
    from detr_ray.data.errors import DataError
    from detr_ray.retries import reason_of

    go_on = "what is done is kept: the same command goes on with it"
    try:
        yield
    except KeyboardInterrupt:
        say(go_on)
        raise
    except OSError as error:
        raise DataError(f"--out: {folder.location} could not be written: {reason_of(error)}; {go_on}") from error


def _finish(job: PredictionJob, folder: ResultFolder, arguments: argparse.Namespace) -> int:
    from detr_ray.engine.reporting.progress import Pace
    from detr_ray.evaluation import DetectionTable
    from detr_ray.prediction.pictures import draw_pictures

    assert job.saved.label_map is not None
    names = dict(job.saved.label_map.categories)
    least_drawn = arguments.picture_score
    if least_drawn is None:
        least_drawn = PICTURE_SCORE if arguments.threshold is None else 0.0

    def draw(found: DetectionTable) -> None:
        draw_pictures(folder.pictures, job.index, found, names, least_drawn, Pace("drew", say))

    with _writing_to(folder):
        found, bad = folder.finish(arguments.to, least_drawn, draw)
    images = len(job.index) + len(job.unreadable)
    left_out = f"; {len(bad)} could not be read, see bad_images.txt" if bad else ""
    what = counted(len(found), "detection")
    say(f"{what} on {images - len(bad)} of {counted(images, 'image')}{left_out}: {folder.location}")
    if arguments.threshold is None:
        say(
            "without --threshold all are kept, however low their score; --threshold best_f1 keeps what is worth showing"
        )
    if "pictures" in arguments.to:
        drawn = int((found.scores >= least_drawn).sum())
        which = "all" if drawn == len(found) else f"{drawn} of them"
        say(f"pictures/ shows {which}" + (f": scores of at least {least_drawn:g}" if drawn < len(found) else ""))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.predict``."""
    return run_command("predict", DESCRIPTION, _predict, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
