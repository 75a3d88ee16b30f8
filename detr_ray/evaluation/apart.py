"""Scoring in a process of its own, at the lowest priority: whoever trains keeps its cores and its interpreter.

The process gets columns and gives numbers, both as plain data; it needs numpy and starts in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from detr_ray.evaluation.coco_metrics import CocoMetrics, evaluate_detections
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-c", "from detr_ray.evaluation.apart import main; main()")
_LOWEST_PRIORITY = 19


class ScoringFailed(RuntimeError):  # noqa: N818 - it names what happened
    """The process that scores gave no numbers; the message says why."""


def evaluate_apart(ground_truth: GroundTruth, detections: DetectionTable, limit_s: float) -> CocoMetrics:
    """What `evaluate_detections` gives for all images, computed by another process.

    Raises:
        ScoringFailed: it could not be started, or failed.
        TimeoutError: it took more than ``limit_s`` seconds and was ended.
    """
    # The package may be importable here because of how this process was started, and not by itself.
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as columns:
        try:
            write_columns(columns, ground_truth, detections)
            columns.seek(0)
            done = subprocess.run(
                COMMAND,
                stdin=columns,
                capture_output=True,
                env=environment,
                timeout=limit_s,
                check=False,
                text=True,
                process_group=0,  # Ctrl-C is not for it; but Linux weighs priorities within one session only
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"scoring takes more than {limit_s:g} seconds") from error
        except OSError as error:
            raise ScoringFailed(f"it could not be started: {error}") from error
    said = done.stderr.strip().splitlines()
    if done.returncode:
        logger.error("scoring failed:\n%s", done.stderr)
        raise ScoringFailed(said[-1] if said else f"its process ended with code {done.returncode}")
    for line in said:
        logger.warning("%s", line)
    return CocoMetrics(**json.loads(done.stdout))


def write_columns(file: IO[bytes], ground_truth: GroundTruth, detections: DetectionTable) -> None:
    """Writes ground truth and detections as arrays."""
    columns: dict[str, Any] = {
        f"truth_{field.name}": getattr(ground_truth, field.name)
        for field in dataclasses.fields(GroundTruth)
        if field.name != "categories"
    }
    columns |= {f"found_{field.name}": getattr(detections, field.name) for field in dataclasses.fields(DetectionTable)}
    names = json.dumps(ground_truth.categories)
    np.savez(file, categories=np.array(names), **columns)


def read_columns(file: IO[bytes]) -> tuple[GroundTruth, DetectionTable]:
    """Reads what `write_columns` wrote; nothing is unpickled."""
    with np.load(file, allow_pickle=False) as columns:
        truth = {name.removeprefix("truth_"): columns[name] for name in columns.files if name.startswith("truth_")}
        found = {name.removeprefix("found_"): columns[name] for name in columns.files if name.startswith("found_")}
        categories = tuple((number, name) for number, name in json.loads(str(columns["categories"])))
    return GroundTruth(**truth, categories=categories), DetectionTable(**found)


def main() -> None:
    """The process: columns from its standard input, numbers to its standard output."""
    if hasattr(os, "nice"):
        os.nice(_LOWEST_PRIORITY)
    metrics = evaluate_detections(*read_columns(sys.stdin.buffer))
    sys.stdout.write(json.dumps(dataclasses.asdict(metrics)))


if __name__ == "__main__":
    main()
