"""Pictures of a training run from what it logged."""

from __future__ import annotations

from detr_ray.engine.past_run import PastRun
from detr_ray.engine.pictures.request import Drawn
from detr_ray.viz.curves import RunCurves, schedules_figure, step_times_figure, training_figure


def curves_of(run: PastRun) -> RunCurves:
    """A run's metrics as pictures take them."""
    return RunCurves(run.name, run.curves())


def training_picture(run: PastRun) -> Drawn:
    """Losses, validation scores and gradient norm over the training."""
    return Drawn(training_figure([curves_of(run)]), _sources(run))


def schedules_picture(run: PastRun) -> Drawn:
    """Learning rates and loss weights as they were."""
    return Drawn(schedules_figure(curves_of(run)), _sources(run))


def step_times_picture(run: PastRun) -> Drawn:
    """How the time of a step was spent."""
    return Drawn(step_times_figure(curves_of(run)), _sources(run))


def _sources(run: PastRun) -> list[str]:
    if run.history is None:
        return [f"{run.directory.path} holds no metrics: the run was not recorded, or on another machine"]
    points = sum(len(steps) for steps, _ in run.history.metrics.values())
    return [f"{points:,} points of {len(run.history.metrics)} metrics"]
