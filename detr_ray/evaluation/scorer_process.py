"""COCO's numbers computed by another process, so that training keeps its interpreter and most of its cores.

The process gets columns and gives numbers, both as plain data; it needs numpy and starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
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

COMMAND = (sys.executable, "-c", "from detr_ray.evaluation.scorer_process import main; main()")
NICENESS = 3
"""Added to that of training, which Ray starts at 15 of 19. Linux then gives the scorer half of training's time where
both want a core: training goes first, and scores are there in seconds on a busy machine too. (19 steps are a seventieth
of the time, two minutes instead of ten seconds.)"""
_END_S = 10.0


class ScoringFailed(RuntimeError):  # noqa: N818 - it names what happened
    """The scorer process gave no numbers; the message says why."""


class ScorerProcess:
    """A process that computes what `evaluate_detections` gives for all images; it runs from the beginning.

    Args:
        ground_truth: the validation set.
        detections: what was found on it.

    Raises:
        ScoringFailed: it could not be started.
    """

    def __init__(self, ground_truth: GroundTruth, detections: DetectionTable) -> None:
        # The package may be importable here because of how this process was started, and not by itself.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        with contextlib.ExitStack() as files:
            try:
                # Files, and not pipes: a process that is stopped does not read, and none of them may have to wait.
                self._output, self._messages = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
                with tempfile.TemporaryFile() as columns:
                    write_columns(columns, ground_truth, detections)
                    columns.seek(0)
                    self._process = subprocess.Popen(
                        COMMAND,
                        stdin=columns,
                        stdout=self._output,
                        stderr=self._messages,
                        env=environment,
                        process_group=0,  # Ctrl-C is not for it; but Linux weighs priorities within one session only
                    )
            except OSError as error:
                raise ScoringFailed(f"its process could not be started: {error}") from error
            self._files = files.pop_all()

    def result(self, limit_s: float) -> CocoMetrics:
        """Waits for the numbers; the process has ended when this returns or raises.

        Raises:
            ScoringFailed: it failed, was ended, or took more than ``limit_s`` seconds.
        """
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise ScoringFailed(f"it takes more than {limit_s:.0f} seconds") from error
        finally:
            self.end()
        with self._files:
            self._output.seek(0)
            self._messages.seek(0)
            output, said = self._output.read(), self._messages.read().strip().splitlines()
        if code < 0:
            raise ScoringFailed(f"its process was ended by signal {-code}")
        if code:
            logger.info("scoring failed:\n%s", "\n".join(said))
            raise ScoringFailed(said[-1] if said else f"its process ended with code {code}")
        for line in said:
            logger.warning("%s", line)
        return CocoMetrics(**json.loads(output))

    def end(self) -> None:
        """Ends the process, also one that is stopped; fine where it has ended."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk in the kernel, and ends after that
            self._process.wait(_END_S)


def score_in_process(ground_truth: GroundTruth, detections: DetectionTable, limit_s: float) -> CocoMetrics:
    """Starts a `ScorerProcess` and waits for its numbers."""
    return ScorerProcess(ground_truth, detections).result(limit_s)


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
        os.nice(NICENESS)
    metrics = evaluate_detections(*read_columns(sys.stdin.buffer))
    sys.stdout.write(json.dumps(dataclasses.asdict(metrics)))


if __name__ == "__main__":
    main()
