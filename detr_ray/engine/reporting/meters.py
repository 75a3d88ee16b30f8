"""Records of steps: their means over a logging interval, and the images that each worker got."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from detr_ray.engine.checkpoints.run_checkpoints import Inessential
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.training_step.step import StepOutcome, StepTimes
from detr_ray.loss import ERROR_NAMES

_PHASES = tuple(f"{field.name}_s" for field in dataclasses.fields(StepTimes))
"""Seconds a phase; ``loss`` without its ending would be the training loss."""
_COUNTS = (
    "steps", "seconds", "grad_norm", "skipped", "worker_steps", "measured", "padded_pixels", "image_pixels",
    "bad_images",
)  # fmt: skip


class Meters:
    """Collects step outcomes without waiting for the device, and sums them over workers when asked.

    Args:
        context: this worker's group.
        global_batch_size: images of one step over all workers.
    """

    def __init__(self, context: WorkerContext, global_batch_size: int) -> None:
        self._context = context
        self._global_batch_size = global_batch_size
        self._loss_names: tuple[str, ...] = ()
        self.restart()

    def restart(self, carried: Mapping[str, float] | None = None) -> None:
        """Begins an interval.

        Args:
            carried: its sums so far (`totals`), if an earlier process began it.
        """
        self._carried = dict(carried or {}) if self._context.rank == 0 else {}
        if "worker_steps" in self._carried:  # those of a checkpoint from before this was counted
            self._carried.setdefault("measured", self._carried["worker_steps"])
        self._outcomes: list[StepOutcome] = []
        self._started = time.perf_counter()

    def add(self, outcome: StepOutcome) -> None:
        """Adds one step."""
        self._outcomes.append(outcome)

    def totals(self, times: StepTimes) -> dict[str, float]:
        """Sums over the interval and over all workers, the same on every worker; every worker must call it.

        Args:
            times: this worker's seconds a phase since the interval began in this process.
        """
        own = self._own_counts() | {f"{phase}_s": seconds for phase, seconds in dataclasses.asdict(times).items()}
        names = self._agreed_loss_names()
        device = self._context.device
        counts = [self._carried.get(name, 0.0) + own[name] for name in (*_COUNTS, *_PHASES)]
        losses = [self._own_loss(name) for name in names]
        numbers = torch.cat(
            [torch.tensor(counts, dtype=torch.float64).to(device), *(loss.reshape(1).to(device) for loss in losses)]
        )
        summed = self._context.all_reduce_sum(numbers).tolist()
        return dict(zip((*_COUNTS, *_PHASES, *names), summed, strict=True))

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """An interval's `totals` as means under their public names.

        Losses are means over the steps that have them: a step has none of a micro-batch whose predictions are not
        finite. If no step has any, they are left out.
        """
        steps, seconds = max(totals["steps"], 1), max(totals["seconds"], 1e-9)
        worker_steps = max(totals["worker_steps"], 1)
        workers = worker_steps / steps
        measured = totals["measured"]
        metrics = {
            f"train/{name}": totals[name] * (1 if name in ERROR_NAMES else workers) / measured
            for name in (self._loss_names if measured else ())
        }
        metrics |= {
            "train/grad_norm": totals["grad_norm"] / steps,
            "train/skipped_steps": totals["skipped"],
            "train/bad_images": totals["bad_images"],
            "perf/images_per_s": steps * self._global_batch_size / seconds,
            "perf/step_s": seconds / steps,
            "perf/data_wait_frac": totals["data_wait_s"] / (seconds * workers),
            "perf/padding_frac": 1 - totals["image_pixels"] / max(totals["padded_pixels"], 1),
        }
        return metrics | {f"perf/{phase}": totals[phase] / worker_steps for phase in _PHASES}

    def _own_counts(self) -> dict[str, float]:
        """This worker's counts; counts that are the same on all workers are given by rank 0 only."""
        outcomes, is_first = self._outcomes, self._context.rank == 0
        return {
            "steps": len(outcomes) * is_first,
            "seconds": (time.perf_counter() - self._started) * is_first,
            "grad_norm": sum(outcome.grad_norm for outcome in outcomes) * is_first,
            "skipped": sum(outcome.skipped for outcome in outcomes) * is_first,
            "worker_steps": len(outcomes),
            "measured": sum(bool(outcome.losses) for outcome in outcomes),
            "padded_pixels": sum(outcome.padded_pixels for outcome in outcomes),
            "image_pixels": sum(outcome.image_pixels for outcome in outcomes),
            "bad_images": sum(len(outcome.bad_images) for outcome in outcomes),
        }

    def _own_loss(self, name: str) -> Tensor:
        total = torch.tensor(self._carried.get(name, 0.0), dtype=torch.float64)
        for outcome in self._outcomes:
            if name in outcome.losses:
                value = outcome.losses[name].double()
                total = total.to(value.device) + (value / outcome.num_micro_batches if name in ERROR_NAMES else value)
        return total

    def _agreed_loss_names(self) -> tuple[str, ...]:
        """Names of all losses, and of the last layer's errors, as the criterion gives them.

        A worker whose predictions were not finite has no losses; it gets the names from the others.
        """
        if not self._loss_names:
            own = {name for outcome in self._outcomes for name in outcome.losses}
            found = {name for names in self._context.gather(sorted(own)) for name in names}
            self._loss_names = tuple(
                sorted(name for name in found if name in ERROR_NAMES or not name.startswith(ERROR_NAMES))
            )
        return self._loss_names


class StreamRecord:
    """One worker's record of the images of each step (``train.record_stream``).

    Args:
        folder: the run's folder; None where nothing is recorded.
        context: this worker's group.
        inessential: guards all writing after the first: if the disk fails later, lines of the record are missing.
    """

    def __init__(self, folder: Path | None, context: WorkerContext, inessential: Inessential) -> None:
        self._path = None if folder is None else folder / "stream" / f"rank-{context.rank:05d}.jsonl"
        self._world_size = context.world_size
        self._inessential = inessential
        self._begun = False

    def add(self, step: int, outcome: StepOutcome) -> None:
        """Writes one step.

        Raises:
            OSError: the first one of this process cannot be written.
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
