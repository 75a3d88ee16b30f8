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
        earlier: trials of an earlier process; new ones are compared with them, too.
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
        # Trials of a population keep running and get orders (`control`). Ray Tune's own scheduler would stop a moved
        # trial and restart it from a checkpoint of Tune, and there are none.
        return FIFOScheduler()
    named = ByName(scheduler)
    for trial in earlier:
        named.tell_again(trial)
    return named


@dataclasses.dataclass(frozen=True)
class _Named:
    """A stand-in for a Ray Tune trial: schedulers use only its id, here the trial's name."""

    trial_id: str


class _NoWaitingTrials:
    """A stand-in for Tune's controller without waiting trials, for which the median rule would pause others."""

    def get_live_trials(self) -> list[Any]:
        """No trials."""
        return []


class ByName(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """A wrapper of a scheduler that identifies trials by their names.

    For Ray Tune, a restarted trial is a new one, and the scheduler would compare it with its own first attempt. Here it
    stays the same trial, also in another process, and a repeated evaluation counts once.

    Args:
        scheduler: the wrapped scheduler.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._told: dict[str, float] = {}  # name -> epoch of the last evaluation

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Adds a trial."""
        self._add(trial.config["trial"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Whether the trial goes on."""
        return self._decide(trial.config["trial"], result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Passes on the last evaluation, if there was one."""
        self._complete(trial.config["trial"], result)

    def tell_again(self, trial: Trial) -> None:
        """Passes on the evaluations of a trial from an earlier process; what was decided then stays decided."""
        self._add(trial.name)
        results = [{"epoch": epoch, "value": value} for epoch, _, value in trial.history]
        if isinstance(self._scheduler, MedianStoppingRule):
            # Asked, it would compare them with evaluations that came later, and fail at the next one of a trial that it
            # would have stopped. Its `on_trial_complete` only notes them.
            for result in results:
                self._complete(trial.name, result)
            return
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
