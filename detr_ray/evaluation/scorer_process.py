"""Computes COCO's metrics in another process, so that training is not slowed down.

The process reads arrays and writes numbers. It imports only numpy, so it starts in a fraction of a second.
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
"""Added to the niceness of training, which Ray starts at 15 of 19. On a busy core Linux then gives the scorer half as
much time as training, and scoring takes about ten seconds. (A difference of 19 gives a seventieth: two minutes.)"""
_END_S = 10.0


class ScoringFailed(RuntimeError):  # noqa: N818 - it names what happened
    """The scorer process failed; the message says why."""


class ScorerProcess:
    """A process that runs `evaluate_detections`. Creating the object starts the process.

    Args:
        ground_truth: the validation set.
        detections: the detections in it.

    Raises:
        ScoringFailed: the process could not be started.
    """

    def __init__(self, ground_truth: GroundTruth, detections: DetectionTable) -> None:
        # The new process needs this process's import path to find the package.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        with contextlib.ExitStack() as files:
            try:
                # Files instead of pipes: with a pipe, one process would wait for the other to read.
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
                        process_group=0,  # no Ctrl-C. Not a session: Linux compares niceness within one only
                    )
            except OSError as error:
                raise ScoringFailed(f"its process could not be started: {error}") from error
            self._files = files.pop_all()

    def result(self, limit_s: float) -> CocoMetrics:
        """Waits for the result. The process has ended when this method returns or raises.

        Raises:
            ScoringFailed: the process failed, was killed, or took more than ``limit_s`` seconds.
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
            output, messages = self._output.read(), self._messages.read().strip().splitlines()
        if code < 0:
            raise ScoringFailed(f"its process was ended by signal {-code}")
        if code:
            logger.info("scoring failed:\n%s", "\n".join(messages))
            raise ScoringFailed(messages[-1] if messages else f"its process ended with code {code}")
        for line in messages:
            logger.warning("%s", line)
        return CocoMetrics(**json.loads(output))

    def end(self) -> None:
        """Kills the process, if it still runs."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is blocked in the kernel (disk) and ends after that
            self._process.wait(_END_S)


def write_columns(file: IO[bytes], ground_truth: GroundTruth, detections: DetectionTable, **more: Any) -> None:
    """Writes ground truth and detections as arrays, and ``more`` beside them."""
    columns: dict[str, Any] = {
        f"truth_{field.name}": getattr(ground_truth, field.name)
        for field in dataclasses.fields(GroundTruth)
        if field.name != "categories"
    }
    columns |= {f"found_{field.name}": getattr(detections, field.name) for field in dataclasses.fields(DetectionTable)}
    names = json.dumps(ground_truth.categories)
    np.savez(file, categories=np.array(names), **columns | more)


def read_columns(file: IO[bytes]) -> tuple[GroundTruth, DetectionTable]:
    """Reads the arrays of `write_columns`, without unpickling."""
    with np.load(file, allow_pickle=False) as columns:
        truth = {name.removeprefix("truth_"): columns[name] for name in columns.files if name.startswith("truth_")}
        found = {name.removeprefix("found_"): columns[name] for name in columns.files if name.startswith("found_")}
        categories = tuple((number, name) for number, name in json.loads(str(columns["categories"])))
    return GroundTruth(**truth, categories=categories), DetectionTable(**found)


def main() -> None:
    """The scorer process: reads arrays from standard input, writes metrics as JSON to standard output."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    metrics = evaluate_detections(*read_columns(sys.stdin.buffer))
    sys.stdout.write(json.dumps(dataclasses.asdict(metrics)))


if __name__ == "__main__":
    main()
