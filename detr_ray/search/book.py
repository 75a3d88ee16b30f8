"""The trials of a running search: the next one, and the state of each, saved after each change.

If the storage fails, the search goes on, and the trials are written again some seconds later.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from detr_ray.callbacks import Say
from detr_ray.retries import reason_of
from detr_ray.search.trials import Mode, State, Trial, best_trial, trial_name, write_trials

AGAIN_AFTER_S = 10.0
"""After a storage error, the trials are written again after this time at the earliest."""


class Book:
    """Keeps the trials of a search.

    Args:
        folder: of the search; the trials are written there.
        mode: whether a larger or a smaller metric is better.
        max_failures: how often a failed trial is restarted.
        trials: those of an earlier process.
        say: shows the user a line.

    Raises:
        OSError: the trials cannot be written; later errors of this kind are only said.
    """

    def __init__(
        self,
        folder: str,
        mode: Mode,
        max_failures: int,
        trials: Iterable[Trial] = (),
        say: Say = lambda line: None,
    ) -> None:
        self._folder = folder
        self._mode = mode
        self._max_failures = max_failures
        self._trials = {trial.name: _not_running(trial) for trial in trials}
        self._say = say
        self._began: dict[str, float] = {}
        self._failed_at: float | None = None  # when the trials could not be written; None if the file has all of them
        self.num_results = sum(len(trial.history) for trial in self._trials.values())
        self.save()

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of creation; those that run with their seconds up to now."""
        return [self._up_to_now(trial) for trial in self._trials.values()]

    @property
    def counts(self) -> Counter[State]:
        """How many trials are in which state."""
        return Counter(trial.state for trial in self._trials.values())

    @property
    def best(self) -> Trial | None:
        """The best trial; None where nothing was measured."""
        return best_trial(self.trials, self._mode)

    def __getitem__(self, name: str) -> Trial:
        return self._trials[name]

    def next_waiting(self) -> Trial | None:
        """The first trial that waits for its start."""
        return next((trial for trial in self._trials.values() if trial.state == "waiting"), None)

    def add(self, values: Mapping[str, Any], problem: str = "") -> Trial:
        """Adds a trial.

        Args:
            values: parameter -> value.
            problem: why the configuration refuses it; empty if it does not.
        """
        state: State = "refused" if problem else "waiting"
        return self._keep(Trial(trial_name(len(self._trials)), dict(values), state, problem))

    def start(self, name: str) -> Trial:
        """Notes that a trial was started."""
        self._began[name] = time.monotonic()
        trial = self._trials[name]
        return self._keep(dataclasses.replace(trial, state="running", attempts=trial.attempts + 1, problem=""))

    def measure(self, name: str, epoch: float, step: int, value: float) -> Trial:
        """Notes an evaluation."""
        self.num_results += 1
        return self._keep(self._trials[name].measured(epoch, step, value, self._mode))

    def move(self, name: str, values: Mapping[str, Any], generation: int, donor: Trial, step: int) -> Trial:
        """Notes that a trial continues from another trial's weights, with that trial's measurements up to there.

        Args:
            name: of the trial.
            values: its new parameters.
            generation: number of its moves, including this one.
            donor: the other trial.
            step: step to continue from.
        """
        history = tuple(entry for entry in donor.history if entry[1] <= step)
        return self._keep(self._trials[name].moved(values, generation, history, step, self._mode))

    def set_path(self, name: str, run_path: str) -> None:
        """Notes where a trial's run is."""
        self._keep(dataclasses.replace(self._trials[name], run_path=run_path))

    def end(self, name: str, state: State, problem: str = "") -> Trial:
        """Notes that a trial has ended, or was stopped."""
        trial = self._up_to_now(self._trials[name])
        self._began.pop(name, None)
        return self._keep(dataclasses.replace(trial, state=state, problem=problem))

    def fail(self, name: str, problem: str, *, again: bool) -> Trial:
        """Notes a failure: the trial waits for a restart, or has failed.

        Args:
            name: of the trial.
            problem: what happened.
            again: whether a restart may help.
        """
        failures = self._trials[name].failures + 1
        self._trials[name] = dataclasses.replace(self._trials[name], failures=failures)
        again = again and failures <= self._max_failures
        return self.end(name, "waiting" if again else "failed", problem)

    def save(self) -> None:
        """Writes the trials.

        Raises:
            OSError: the storage fails.
        """
        write_trials(self._folder, self.trials)
        if self._failed_at is not None:
            self._say(f"the trials are written to {self._folder} again")
        self._failed_at = None

    def save_again(self) -> None:
        """Writes the trials if that failed some time ago."""
        if self._failed_at is not None and time.monotonic() - self._failed_at >= AGAIN_AFTER_S:
            self._try_to_save()

    def _keep(self, trial: Trial) -> Trial:
        self._trials[trial.name] = trial
        if self._failed_at is None:
            self._try_to_save()
        return trial

    def _try_to_save(self) -> None:
        try:
            self.save()
        except OSError as error:
            if self._failed_at is None:
                self._say(
                    f"WARNING: the trials cannot be written to {self._folder} ({reason_of(error)}); the search goes "
                    "on, and it is tried again"
                )
            self._failed_at = time.monotonic()

    def _up_to_now(self, trial: Trial) -> Trial:
        began = self._began.get(trial.name)
        if began is None:
            return trial
        now = time.monotonic()
        self._began[trial.name] = now
        self._trials[trial.name] = dataclasses.replace(trial, seconds=trial.seconds + now - began)
        return self._trials[trial.name]


def _not_running(trial: Trial) -> Trial:
    """A trial that an earlier process left running: it now waits to continue."""
    return trial if trial.is_over else dataclasses.replace(trial, state="waiting")
