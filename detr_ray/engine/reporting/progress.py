"""What a run tells the user: lines of progress, and at its end its result.

Imports neither the loop nor the model, which a program that only passes this on does not need.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from detr_ray.callbacks import Say
from detr_ray.printable import counted

if TYPE_CHECKING:
    from detr_ray.engine.context import LeaveReason


EVALUATION_LINE = ("AP", "AP50", "AP75", "AR100")
INTERVAL_S = 5.0
"""Least time between two lines about work over many images."""


def duration(seconds: float) -> str:
    """Seconds as text: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def step_line(metrics: Mapping[str, float], step: int, total_steps: int, steps_per_epoch: int) -> str:
    """One line about the steps of a logging interval; losses are NaN if no step had any."""
    left = (total_steps - step) * metrics["perf/step_s"]
    total, class_loss, box, giou = (
        metrics.get(f"train/{name}", math.nan) for name in ("loss", "loss_ce", "loss_bbox", "loss_giou")
    )
    line = (
        f"epoch {step / steps_per_epoch:6.2f}  step {step}/{total_steps}  loss {total:.3f}  "
        f"(class {class_loss:.3f}, box {box:.4f}, giou {giou:.3f})  lr {metrics['optim/lr']:.1e}  "
        f"{metrics['perf/images_per_s']:.1f} images/s  data wait {metrics['perf/data_wait_frac']:.0%}  "
        f"left {duration(left)}"
    )
    if metrics["train/skipped_steps"]:
        line += f"  ({counted(round(metrics['train/skipped_steps']), 'update')} left out: not finite)"
    if metrics["train/bad_images"]:
        line += f"  ({counted(round(metrics['train/bad_images']), 'unreadable image')} left out)"
    return line


def evaluation_line(metrics: Mapping[str, float], epoch: float, is_best: bool) -> str:
    """One line about an evaluation."""
    numbers = [f"{name} {metrics[key]:.3f}" for name in EVALUATION_LINE if (key := f"val/{name}") in metrics]
    found = "  ".join(numbers) or "no annotated boxes, no scores"
    line = f"epoch {epoch:6.2f}  evaluated in {duration(metrics['val/seconds'])}: {found}"
    return line + ("  (best so far)" if is_best else "")


class Pace:
    """Shows the progress of work over images, in lines with a least interval.

    Args:
        what: what the line starts with.
        say: shows the user a line.
        interval_s: least time between two lines.
    """

    def __init__(self, what: str, say: Say, interval_s: float = INTERVAL_S) -> None:
        self._what = what
        self._say = say
        self._interval_s = interval_s
        self._started = self._said = time.perf_counter()

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """Notes the number of images that are done; shows a line, with the text ``more``, if it is time for one."""
        now = time.perf_counter()
        if now - self._said < self._interval_s or not done:
            return
        self._said = now
        rate = done / (now - self._started)
        left = duration((total - done) / rate)
        self._say(
            f"{self._what} {done} of {total} images, {rate:.{1 if rate < 10 else 0}f} images/s, "
            f"{more + ', ' if more else ''}left {left}"
        )


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        run_name: its name.
        run_path: where it keeps its checkpoints.
        status: ``finished``; ``stopped`` on request, can be resumed; ``nothing to do``: it was finished before.
        step: optimizer steps taken since the beginning of the run.
        metrics: what the last evaluation gave.
        best_metrics: what the best checkpoint's evaluation gave.
        best_checkpoint: its folder.
        table: the 12 COCO numbers of the last evaluation, for people.
        train_s: seconds this process spent in the loop, evaluations included.
        leave: why it stopped before its end.
        ended_early: why it is finished before its last step; empty where it is not.
    """

    run_name: str
    run_path: str
    status: Literal["finished", "stopped", "nothing to do"]
    step: int
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    best_checkpoint: str | None = None
    table: str = ""
    train_s: float = 0.0
    leave: LeaveReason | None = None
    ended_early: str = ""
