"""Means of what the steps of one logging interval gave, over all workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from detr_ray.engine.context import WorkerContext
from detr_ray.engine.step import StepOutcome, StepTimes

# These are means over images, and not shares of a sum as the losses are.
MEANS = ("class_error", "cardinality_error")


class Meters:
    """Collects step outcomes without waiting for the device, and sums them over workers when asked.

    Args:
        context: this worker's group.
        names: the losses to report, the same on every worker.
        global_batch_size: images of one step over all workers.
    """

    def __init__(self, context: WorkerContext, names: Sequence[str], global_batch_size: int) -> None:
        self._context = context
        self._names = names
        self._global_batch_size = global_batch_size
        self._restart()

    def _restart(self) -> None:
        self._outcomes: list[StepOutcome] = []
        self._started = time.perf_counter()

    def add(self, outcome: StepOutcome) -> None:
        """Takes one step in."""
        self._outcomes.append(outcome)

    def flush(self, times: StepTimes, num_micro_batches: int) -> dict[str, float]:
        """Metrics of the interval under their public names, the same on every worker; every worker must call it.

        Args:
            times: this worker's seconds a phase over the interval.
            num_micro_batches: forward passes of this worker a step, for the means over images.
        """
        steps = max(len(self._outcomes), 1)
        seconds = time.perf_counter() - self._started
        names = self._names
        world_size = self._context.world_size
        sums = [
            sum((outcome.losses[n].double() for outcome in self._outcomes if n in outcome.losses), torch.zeros(()))
            for n in names
        ]
        pixels = [sum(o.padded_pixels for o in self._outcomes), sum(o.image_pixels for o in self._outcomes)]
        phases = [times.data_wait, times.forward, times.loss, times.backward, times.update]
        bad_images = sum(len(o.bad_images) for o in self._outcomes)
        device = self._context.device
        numbers = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64, device=device)
                for value in (*sums, *pixels, *phases, bad_images)
            ]
        )
        totals = self._context.all_reduce_sum(numbers).tolist()
        metrics = {}
        for name, total in zip(names, totals, strict=False):
            base = name.rsplit("_", 1)[0] if name[-1].isdigit() else name
            share = steps * (world_size * max(num_micro_batches, 1) if base in MEANS else 1)
            metrics[f"train/{name}"] = total / share
        padded, images = totals[len(names) : len(names) + 2]
        data_wait, forward, loss, backward, update = totals[len(names) + 2 : len(names) + 7]
        worker_steps = steps * world_size
        metrics |= {
            "train/grad_norm": sum(o.grad_norm for o in self._outcomes) / steps,
            "train/skipped_steps": float(sum(o.skipped for o in self._outcomes)),
            "train/bad_images": totals[-1],
            "perf/images_per_s": steps * self._global_batch_size / max(seconds, 1e-9),
            "perf/step_s": seconds / steps,
            "perf/data_wait_s": data_wait / worker_steps,
            "perf/forward_s": forward / worker_steps,
            "perf/loss_s": loss / worker_steps,
            "perf/backward_s": backward / worker_steps,
            "perf/update_s": update / worker_steps,
            "perf/data_wait_frac": data_wait / max(seconds * world_size, 1e-9),
            "perf/padding_frac": 1 - images / max(padded, 1),
        }
        self._restart()
        return metrics
