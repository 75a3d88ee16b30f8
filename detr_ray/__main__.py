"""``python -m detr_ray COMMAND ...`` and ``detr-ray COMMAND ...``: the same as ``python -m detr_ray.COMMAND ...``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from detr_ray import __version__

COMMANDS = {
    "train": "train a detector, or resume a run",
    "tune": "search settings, each trial a whole training",
    "evaluate": "score a checkpoint on a validation set",
    "predict": "find objects on images with a trained model",
    "check": "look for problems in data, storage and tracking before a run",
    "prepare": "draw a data set, or convert one: COCO, YOLO, shards",
    "watch": "follow a run that is being trained",
    "show": "draw a picture of data, a model, an evaluation or a run",
    "report": "write the report of a run, or of two side by side",
    "registry": "show and change the versions of the registered model",
    "export": "write a model as a file for other runtimes: ONNX, torch.export",
    "serve": "serve a model over HTTP with Ray Serve",
    "send": "send metrics to MLflow that could not be sent during training",
}
"""Modules with a ``main(argv) -> int``, and what each does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; without one, lists them all.

    Args:
        argv: the command and its arguments; None for those of the process.

    Returns:
        The exit code: the command's, or 2 for an unknown one.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0
    if name == "--version":
        sys.stdout.write(f"detr_ray {__version__}\n")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(COMMANDS)}"
        sys.stderr.write(f"error: unknown command '{name}'; {hint}\n")
        return 2
    module = importlib.import_module(f"detr_ray.{name}")
    return int(module.main(rest))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return (
        "usage: detr-ray COMMAND [--config FILE]... [key=value]...\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\ndetr-ray COMMAND --help lists all options and keys. python -m detr_ray.COMMAND is the same.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
