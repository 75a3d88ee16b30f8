"""Ray Tune's schedulers."""

from __future__ import annotations

import dataclasses

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from detr_ray.config import TuneConfig
from detr_ray.search.trials import Trial


def build_scheduler(settings: TuneConfig, epochs: int, earlier: list[Trial]) -> TrialScheduler:
    """The scheduler that stops trials early, or lets all of them train to the end.

    Args:
        settings: which one.
        epochs: length of a training.
        earlier: trials of an earlier process: later ones are compared with them, too.
    """
    if settings.scheduler == "asha":
        scheduler = AsyncHyperBandScheduler(
            metric="value",
            mode=settings.mode,
            time_attr="epoch",
            max_t=epochs,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
        )
    elif settings.scheduler == "median":
        scheduler = MedianStoppingRule(
            metric="value", mode=settings.mode, time_attr="epoch", grace_period=settings.grace_epochs
        )
    else:
        # Trials of a population stay where they are and get orders (`control`). Ray Tune's own scheduler would stop the
        # trial that is moved, and start it again from a checkpoint of Tune's, which it never gets.
        return FIFOScheduler()
    for trial in earlier:
        _tell_again(scheduler, trial)
    return scheduler


@dataclasses.dataclass(frozen=True)
class _Earlier:
    """Stands for a trial of an earlier process, of which a scheduler uses the id alone."""

    trial_id: str


def _tell_again(scheduler: TrialScheduler, trial: Trial) -> None:
    """Tells a scheduler what it knew of a trial in an earlier process."""
    earlier = _Earlier(f"earlier {trial.name}")
    scheduler.on_trial_add(None, earlier)
    for epoch, _, value in trial.history:
        scheduler.on_trial_result(None, earlier, {"epoch": epoch, "value": value, "time_total_s": 0.0})
    if trial.is_over and trial.history:
        epoch, _, value = trial.history[-1]
        scheduler.on_trial_complete(None, earlier, {"epoch": epoch, "value": value})
