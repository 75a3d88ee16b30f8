"""Ray Tune's schedulers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from detr_ray.config import TuneConfig
from detr_ray.runtime.search.unsaved import Unsaved
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
    named = ByName(scheduler)
    for trial in earlier:
        named.tell_again(trial)
    return named


@dataclasses.dataclass(frozen=True)
class _Named:
    """Stands for a trial, of which a scheduler uses the id alone: here, the trial's name."""

    trial_id: str


class _NoWaitingTrials:
    """Stands for Tune's controller. The median rule would pause a trial where another one waits for its start."""

    def get_live_trials(self) -> list[Any]:
        """None."""
        return []


class ByName(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """Another scheduler, which knows trials by their names.

    To Ray Tune, a trial that is started again is a new one. The scheduler would compare it with its own first attempt.
    Here it is the same one, also in another process, and an evaluation that is repeated counts once.

    Args:
        scheduler: the other one.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._told: dict[str, float] = {}  # name -> epoch of the last evaluation

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tells of a trial."""
        self._add(trial.config["trial"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Whether the trial goes on."""
        return self._decide(trial.config["trial"], result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Tells of the last evaluation, if there was one."""
        self._complete(trial.config["trial"], result)

    def tell_again(self, trial: Trial) -> None:
        """Tells what was known of a trial in an earlier process."""
        self._add(trial.name)
        results = [{"epoch": epoch, "value": value} for epoch, _, value in trial.history]
        last = results.pop() if trial.state == "finished" and results else None
        for result in results:
            self._decide(trial.name, result)
        if last is not None:
            self._complete(trial.name, last)

    def _add(self, name: str) -> None:
        self._scheduler.on_trial_add(_NoWaitingTrials(), _Named(name))

    def _decide(self, name: str, result: Mapping[str, Any]) -> str:
        if not self._is_new(name, result):
            return str(TrialScheduler.CONTINUE)
        return str(self._scheduler.on_trial_result(_NoWaitingTrials(), _Named(name), dict(result)))

    def _complete(self, name: str, result: Mapping[str, Any]) -> None:
        # The last result of a trial that failed before its first evaluation has no value.
        if self._is_new(name, result):
            self._scheduler.on_trial_complete(_NoWaitingTrials(), _Named(name), dict(result))

    def _is_new(self, name: str, result: Mapping[str, Any]) -> bool:
        epoch = result.get("epoch")
        if epoch is None or epoch <= self._told.get(name, 0):
            return False
        self._told[name] = epoch
        return True
