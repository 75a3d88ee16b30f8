"""Follows a run from another process, by the progress file in its folder; shows what is new, line by line.

Imports neither torch nor the loop.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from detr_ray.callbacks import Say
from detr_ray.engine.reporting.progress import duration, evaluation_line, step_line
from detr_ray.tracking.run_progress import BEAT_S, RunProgress

SILENT_S = 3 * BEAT_S
"""A process that has written nothing for this time may have died."""
GONE_S = 600.0
"""A process that has written nothing for this time is given up."""
RESTART_S = 60.0
"""Workers are started again within this time, or not at all, after a failure or a change of their number."""


def overview(progress: RunProgress, now: float) -> list[str]:
    """Everything known about a run, as lines.

    Args:
        progress: the run's.
        now: seconds since 1970.
    """
    lines = [*_evaluation_lines(progress)]
    if progress.metrics:
        lines.append(_step_line(progress))
    return [*lines, status_line(progress, now)]


def status_line(progress: RunProgress, now: float) -> str:
    """One line: progress, best score, and what the process does."""
    share = progress.step / max(progress.total_steps, 1)
    epochs = progress.total_steps / progress.steps_per_epoch
    line = (
        f"run {progress.run}: {progress.status}, step {progress.step}/{progress.total_steps} ({share:.0%}), "
        f"epoch {progress.step / progress.steps_per_epoch:.2f} of {epochs:g}"
    )
    best = best_evaluation(progress)
    if best is not None:
        line += f", best AP {progress.evaluations[best]['val/AP']:.3f} after epoch {best / progress.steps_per_epoch:g}"
    if progress.status != "running":
        return line
    line += f", running for {duration(max(0.0, now - progress.started))}"
    silent_s = now - progress.written
    return line if silent_s < SILENT_S else f"{line}; {silence_line(silent_s)}"


def silence_line(seconds: float) -> str:
    """A line that explains why nothing may have been written for this time."""
    return (
        f"no sign of life for {duration(seconds)}: its process may have died. The same command goes on from its last "
        "checkpoint"
    )


def best_evaluation(progress: RunProgress) -> int | None:
    """The step with the highest AP, the first of equals; None where there is none."""
    scores = {step: numbers["val/AP"] for step, numbers in progress.evaluations.items() if "val/AP" in numbers}
    return max(scores, key=lambda step: (scores[step], -step), default=None)


class Follower:
    """Shows what is new in each progress that it is given.

    Args:
        say: shows the user a line.
        clock: a monotonic clock of this machine; the run's clock may be another machine's.
    """

    def __init__(self, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._seen: RunProgress | None = None
        self._changed = clock()
        self._said_silent = False

    def see(self, progress: RunProgress) -> bool:
        """Shows what is new; returns whether the run has ended."""
        before, now = self._seen, self._clock()
        if before is None or progress.written != before.written:
            self._changed, self._said_silent = now, False
        self._seen = progress
        if before is None:
            for line in overview(progress, time.time()):
                self._say(line)
        else:
            self._say_news(before, progress)
        return self._has_ended(progress, now - self._changed)

    def _say_news(self, before: RunProgress, progress: RunProgress) -> None:
        if progress.metrics and progress.step != before.step:
            self._say(_step_line(progress))
        for line in _evaluation_lines(progress, but_not=before.evaluations):
            self._say(line)
        if progress.status != before.status:
            self._say(status_line(progress, time.time()))

    def _has_ended(self, progress: RunProgress, unchanged_s: float) -> bool:
        if progress.status != "running":
            return progress.status == "finished" or unchanged_s > RESTART_S
        if unchanged_s > SILENT_S and not self._said_silent:
            self._said_silent = True
            self._say(silence_line(unchanged_s))
        return unchanged_s > GONE_S


def _step_line(progress: RunProgress) -> str:
    return step_line(progress.metrics, progress.step, progress.total_steps, progress.steps_per_epoch)


def _evaluation_lines(progress: RunProgress, but_not: Mapping[int, object] = {}) -> list[str]:
    """One line for each evaluation, but not for those of some steps."""
    lines = []
    for step, numbers in progress.evaluations.items():
        if step in but_not:
            continue
        until = {s: known for s, known in progress.evaluations.items() if s <= step}
        is_best = best_evaluation(dataclasses.replace(progress, evaluations=until)) == step
        lines.append(evaluation_line(numbers, step / progress.steps_per_epoch, is_best))
    return lines
