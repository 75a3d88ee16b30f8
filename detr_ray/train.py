"""Trains a detector, or resumes a run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_INTERRUPTED, run_command, say
from detr_ray.config import Config
from detr_ray.progress_bar import ProgressBar

if TYPE_CHECKING:
    from detr_ray.engine.hooks import JobHooks
    from detr_ray.engine.job import TrainJob

DESCRIPTION = """Train a detector on Ray workers.

The same command with the same run.name resumes a run where it stopped."""


def _train(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.runtime.session import session_while_importing

    started = time.perf_counter()
    with session_while_importing(config, "detr_ray.engine.job"):
        return _fit(config, started)


def _fit(config: Config, started: float) -> int:
    from detr_ray.engine.reporting.progress import duration
    from detr_ray.engine.reporting.tracking_store import run_tracking_uri
    from detr_ray.runtime.launch import fit
    from detr_ray.tracking import viewing_hint

    with ProgressBar("step") as bar:
        result = fit(config, bar.say, lambda job: _hooks(job, bar))
    if result.status == "nothing to do":
        steps = f"after step {result.step}" if result.ended_early else f"all {result.step} steps"
        say(f"nothing left to do: run {result.run_name} finished {steps} before")
    elif result.status == "stopped":
        say(f"stopped after step {result.step}; the same command with run.name={result.run_name} goes on from there")
    else:
        say(
            f"\nfinished {result.step} steps: {duration(result.train_s)} in the training loop, "
            f"{duration(time.perf_counter() - started)} in all"
        )
    if result.ended_early:
        say(f"ended early: {result.ended_early}")
    if result.table:
        say("\n" + result.table + "\n")
    if result.best_checkpoint is not None:
        say(f"best checkpoint   {result.best_checkpoint} (AP {result.best_metrics['val/AP']:.3f})")
    say(f"everything else   {result.run_path}")
    if config.tracking.enabled:
        say(f"curves            {viewing_hint(run_tracking_uri(config))}")
    return EXIT_INTERRUPTED if result.status == "stopped" else 0


def _hooks(job: TrainJob, bar: ProgressBar) -> JobHooks:
    from detr_ray.engine.hooks import JobHooks

    bar.begin(job.total_steps)
    return JobHooks(on_step=bar.update)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.train``."""
    return run_command("train", DESCRIPTION, _train, argv, check=Config.check_training)


if __name__ == "__main__":
    sys.exit(main())
