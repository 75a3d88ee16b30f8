"""Draws a picture of data, a model, an evaluation or a run."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_FAILED, count, run_command, say, share, usage, with_model, write_result
from detr_ray.config import Config, ConfigError
from detr_ray.engine.pictures.request import Drawn, PictureRequest
from detr_ray.progress_bar import ProgressBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from detr_ray.engine.pictures.of_evaluation import Found

Draw = Callable[[Config, PictureRequest], Drawn]


def _of_data(name: str) -> Draw:
    def draw(config: Config, request: PictureRequest) -> Drawn:
        from detr_ray.engine.pictures import of_data

        pictures = {"batch": of_data.batch_picture, "sample": of_data.sample_picture, "data": of_data.data_picture}
        return pictures[name](config, request, say)

    return draw


def _augmentation(config: Config, request: PictureRequest) -> Drawn:
    from detr_ray.engine.pictures.of_augmentation import augmentation_picture

    return augmentation_picture(config, request, say)


def _of_model(name: str) -> Draw:
    def draw(config: Config, request: PictureRequest) -> Drawn:
        from detr_ray.engine.pictures import of_model
        from detr_ray.model_sources import with_located_model

        pictures = {
            "encoder": of_model.encoder_picture,
            "decoder": of_model.decoder_picture,
            "position": of_model.position_picture,
            "queries": of_model.queries_picture,
        }
        with with_located_model(config) as at_hand:
            return pictures[name](at_hand, request, say)

    return draw


def _of_evaluation(name: str) -> Draw:
    def draw(config: Config, request: PictureRequest) -> Drawn:
        from detr_ray.engine.pictures import of_evaluation as pictures

        found = _evaluated(config)
        if name in ("precision-recall", "sizes", "errors"):
            of_all = {
                "precision-recall": pictures.precision_recall_picture,
                "sizes": pictures.sizes_picture,
                "errors": pictures.errors_picture,
            }
            return of_all[name](found)
        of_some = {
            "predictions": pictures.predictions_picture,
            "worst": pictures.worst_picture,
            "suspicious": pictures.suspicious_picture,
            "confusion": pictures.confusion_picture,
        }
        return of_some[name](found, request)

    return draw


def _of_run(name: str) -> Draw:
    def draw(config: Config, request: PictureRequest) -> Drawn:
        from detr_ray.engine.past_run import open_past_run
        from detr_ray.engine.pictures import of_run

        run = open_past_run(config.checkpoint_to_evaluate(), say)
        pictures = {
            "training": of_run.training_picture,
            "schedules": of_run.schedules_picture,
            "times": of_run.step_times_picture,
        }
        return pictures[name](run)

    return draw


def _evaluated(config: Config) -> Found:
    """What the model of ``eval.checkpoint`` finds in the validation set."""
    from detr_ray.engine.pictures.of_evaluation import Found
    from detr_ray.engine.validation.evaluation_job import prepare_evaluation
    from detr_ray.model_sources import with_located_model

    with with_located_model(config) as at_hand:
        job = prepare_evaluation(at_hand, say)
    from detr_ray.runtime.launch import run_prepared_evaluation

    with ProgressBar("image") as bar:
        bar.begin(job.num_images)
        result = run_prepared_evaluation(job, bar.say, bar.update)
    index = job.data.val
    assert index is not None, "there is a validation set"
    from detr_ray.evaluation import GroundTruth
    from detr_ray.viz.figure import end_of

    return Found(end_of(job.checkpoint), GroundTruth.from_columns(index), result.detections, job.names, index)


PICTURES: dict[str, tuple[str, Draw]] = {
    "batch": ("a planned batch as the model gets it: images, padding, boxes, names", _of_data("batch")),
    "sample": ("samples before and after each step of the augmentation", _of_data("sample")),
    "augmentation": ("the same images under each transform of the augmentation, and under all", _augmentation),
    "data": ("both splits at a glance: boxes, classes, sizes as stored and as planned", _of_data("data")),
    "position": ("the position embedding of a model's first map", _of_model("position")),
    "encoder": ("encoder self-attention from points of an image", _of_model("encoder")),
    "decoder": ("decoder attention of each object that is detected in an image", _of_model("decoder")),
    "queries": ("where each query predicts its boxes, over the validation set", _of_model("queries")),
    "predictions": ("predictions beside annotations: matched, confused, false, missed", _of_evaluation("predictions")),
    "worst": ("the validation images that cost most AP", _of_evaluation("worst")),
    "suspicious": ("validation images whose annotations look wrong", _of_evaluation("suspicious")),
    "precision-recall": ("precision and recall of each category", _of_evaluation("precision-recall")),
    "confusion": ("which categories are taken for which", _of_evaluation("confusion")),
    "sizes": ("AP and AR by the size of objects", _of_evaluation("sizes")),
    "errors": ("what AP50 is lost to: six kinds of errors", _of_evaluation("errors")),
    "training": ("losses, validation scores and gradient norm of a run", _of_run("training")),
    "schedules": ("learning rates and loss weights of a run, as they were", _of_run("schedules")),
    "times": ("where the time of a run's steps went", _of_run("times")),
}
"""What can be shown: its meaning, and what draws it."""

_OF_DATA = ("batch", "sample", "augmentation", "data")

_PROGRAMS = ("xdg-open", "display", "gm", "eog", "xv")
"""The programs that Pillow has show a picture on Linux."""

_WIDTH = max(map(len, PICTURES))
DESCRIPTION = """Draw a picture, and write it into a file (--out) or open it in a window.

batch, sample, augmentation and data show the data that the configuration names. The others show MODEL, as the evaluate
command takes it; training, schedules and times need a run's folder.

WHAT is one of
""" + "\n".join(f"  {name:<{_WIDTH}}  {meaning}" for name, (meaning, _) in PICTURES.items())


def _arguments(parser: argparse.ArgumentParser) -> None:
    default = PictureRequest()
    parser.usage = usage("WHAT [MODEL]")
    parser.add_argument("what", metavar="WHAT", nargs="?", help="what to draw, see above")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="the model or run; left out: eval.checkpoint")
    parser.add_argument(
        "--out", metavar="FILE", help="write the picture into this file (png, svg, pdf, jpg, webp) and open no window"
    )
    parser.add_argument(
        "--images", metavar="N", type=count, default=default.images,
        help=f"how many images the picture shows at most (default {default.images})",
    )  # fmt: skip
    parser.add_argument(
        "--image", metavar="IMAGE",
        help="this image, by its id or its file name (sample, position, encoder, decoder, predictions)",
    )  # fmt: skip
    parser.add_argument(
        "--step", metavar="N", type=_whole, default=default.step,
        help=f"optimizer step whose batch is drawn (batch, sample; augmentation: another draw; default {default.step})",
    )  # fmt: skip
    parser.add_argument(
        "--point", metavar="X,Y", type=_point, action="append", default=[],
        help="in pixels of the stored image; may be repeated (encoder; default: centres of what is detected)",
    )  # fmt: skip
    parser.add_argument(
        "--layer", metavar="N", type=count, help="layer from 1 on (encoder, decoder; default: the last)"
    )
    parser.add_argument(
        "--score", metavar="S", type=share, default=default.score,
        help=f"lowest score of predictions, and strength of suspicions, from 0 to 1 (default {default.score})",
    )  # fmt: skip


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number (got {text})")
    return int(text)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y in pixels (got {text})") from None
    return x, y


def _show(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.engine.preflight.writing import check_outputs

    if arguments.what not in PICTURES:
        like = difflib.get_close_matches(arguments.what or "", PICTURES, n=1)
        given = "nothing is named" if arguments.what is None else f"{arguments.what!r} is not known"
        given += f" (did you mean {like[0]}?)" if like else ""
        raise ConfigError(f"WHAT: {given}; it is one of {', '.join(PICTURES)}")
    if arguments.model is not None and arguments.what in _OF_DATA:
        raise ConfigError(f"MODEL: {arguments.what} shows the data that the configuration names, and no model")
    config = with_model(config, arguments.model)
    if arguments.what not in _OF_DATA:
        config.checkpoint_to_evaluate()  # refused before modules are imported that take seconds
    if arguments.out is None:
        _refuse_window(_why_no_window())
    else:
        _format_of(arguments.out)
        check_outputs({"--out": arguments.out})
    request = PictureRequest(
        arguments.images, arguments.image, arguments.step, tuple(arguments.point), arguments.layer, arguments.score
    )
    drawn = PICTURES[arguments.what][1](config, request)
    for line in drawn.lines:
        say(line)
    return _open(drawn.figure) if arguments.out is None else _write(drawn.figure, arguments.out)


def _format_of(location: str) -> str:
    from detr_ray.viz.figure import FIGURE_FORMATS

    ending = location.partition("?")[0].rpartition(".")[2].lower()
    if ending not in FIGURE_FORMATS:
        raise ConfigError(f"--out: {location} must end in one of {', '.join(f'.{known}' for known in FIGURE_FORMATS)}")
    return ending


def _write(figure: Figure, location: str) -> int:
    from detr_ray.viz.figure import figure_bytes

    content = figure_bytes(figure, _format_of(location))
    return 0 if write_result("--out", location, lambda: content, "picture") else EXIT_FAILED


def _open(figure: Figure) -> int:
    """Has the system's program for pictures show it."""
    import io

    from PIL import Image, ImageShow

    from detr_ray.viz.figure import png_bytes

    if not ImageShow.show(Image.open(io.BytesIO(png_bytes(figure))), "detr_ray"):
        _refuse_window("this machine has no program that shows pictures")
    return 0


def _refuse_window(why_not: str) -> None:
    """Refuses to open a window, if there is a reason."""
    if why_not:
        raise ConfigError(f"--out: {why_not}: give a FILE to write the picture into")


def _why_no_window() -> str:
    """Why no window can be opened; empty where one can.

    Pillow says that a picture was shown where the program could not open a window, and, where IPython is installed,
    where there is no program at all.
    """
    if sys.platform in ("darwin", "win32"):
        return ""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display to open a window on"
    if not any(shutil.which(program) for program in _PROGRAMS):
        return f"this machine has no program that shows pictures ({', '.join(_PROGRAMS)})"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.show``."""
    return run_command("show", DESCRIPTION, _show, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
