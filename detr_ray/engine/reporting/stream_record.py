"""A record of which images each worker saw at each step, for those who want to look: ``train.record_stream``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from detr_ray.engine.checkpoints.run_checkpoints import Inessential
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.step import StepOutcome


class StreamRecord:
    """One worker's part of the record.

    Args:
        folder: the run's folder; None where nothing is recorded.
        context: this worker's group.
        inessential: guards all writing but the first: a disk that fails later costs lines of the record.
    """

    def __init__(self, folder: Path | None, context: WorkerContext, inessential: Inessential) -> None:
        self._path = None if folder is None else folder / "stream" / f"rank-{context.rank:05d}.jsonl"
        self._world_size = context.world_size
        self._inessential = inessential
        self._begun = False

    def add(self, step: int, outcome: StepOutcome) -> None:
        """Writes one step.

        Raises:
            OSError: not even the first one of this process can be written.
        """
        if self._path is None:
            return
        line = {
            "step": step,
            "world_size": self._world_size,
            "positions": outcome.positions,
            "image_ids": outcome.image_ids,
        }
        with self._inessential("the stream cannot be recorded") if self._begun else contextlib.nullcontext():
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._begun = True
