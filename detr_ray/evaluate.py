"""Scores a checkpoint on a validation set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from detr_ray.cli import run_command
from detr_ray.config import Config, ConfigError
from detr_ray.train import say

DESCRIPTION = """Score a checkpoint on the validation set: COCO's 12 numbers, and the AP of each category.

eval.checkpoint names the checkpoint: a run's folder, a checkpoint in it, or DETR weights (path or URL)."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    parser.add_argument(
        "--detections", metavar="FILE", help="write all detections to this file, in COCO's result format"
    )


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
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.evaluate``."""
    return run_command("evaluate", DESCRIPTION, _evaluate, argv, add_arguments=_arguments, check=_check)


if __name__ == "__main__":
    sys.exit(main())
