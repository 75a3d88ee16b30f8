"""The trials of a search, as they are kept in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pyarrow import fs

from detr_ray.addresses import join
from detr_ray.locations import file_info, read_bytes, write_bytes

TRIALS_FILE = "trials.json"

State = Literal["waiting", "running", "finished", "stopped early", "failed", "refused", "stopped"]
STATES: tuple[str, ...] = get_args(State)

Mode = Literal["max", "min"]
"""Whether a larger or a smaller metric is better."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of a search.

    Attributes:
        name: ``t000``, ``t001``, ... in the order of creation.
        values: parameter -> what was drawn for it.
        state: ``waiting``, ``running``; ``finished`` (trained to the end), ``stopped early`` (by the scheduler),
            ``failed``, ``refused`` (the configuration or a constraint refuses the values), ``stopped`` (by the user or
            by the time budget; can go on).
        problem: why it failed or was refused; empty otherwise.
        epoch: epochs trained.
        step: optimizer steps taken.
        value: the metric of the last validation.
        best: the best so far, also of runs that it was moved away from.
        best_epoch: epoch of this value.
        history: (epoch, step, metric) of each validation.
        seconds: time that it trained, over all attempts.
        run_path: folder or URI of its current run.
        attempts: number of starts.
        failures: number of those that failed.
        generation: number of exploits that it went through; its run is ``<name>-g<generation>`` from the first on.
        left: (generation, epoch, step, metric) of the best validation that is not in ``history`` any more, because it
            was moved; None if it never was.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    state: State = "waiting"
    problem: str = ""
    epoch: float = 0.0
    step: int = 0
    value: float | None = None
    best: float | None = None
    best_epoch: float | None = None
    history: tuple[tuple[float, int, float], ...] = ()
    seconds: float = 0.0
    run_path: str | None = None
    attempts: int = 0
    failures: int = 0
    generation: int = 0
    left: tuple[int, float, int, float] | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good, also if the search is resumed."""
        return self.state in ("finished", "stopped early", "failed", "refused")

    @property
    def run_name(self) -> str:
        """Name of its present run."""
        return run_name(self.name, self.generation)

    def measured(self, epoch: float, step: int, value: float, mode: Mode) -> Trial:
        """The trial after a validation.

        Args:
            epoch: epochs trained.
            step: optimizer steps taken. Later measurements are dropped: the trial went back to a checkpoint.
            value: the metric.
            mode: whether a larger or a smaller value is better.
        """
        return self.with_history((*(entry for entry in self.history if entry[1] < step), (epoch, step, value)), mode)

    def with_history(self, history: tuple[tuple[float, int, float], ...], mode: Mode) -> Trial:
        """The trial with these validations as its own.

        Args:
            history: (epoch, step, metric) of each, at least one.
            mode: whether a larger or a smaller value is better.
        """
        known = history if self.left is None else (*history, self.left[1:])
        best = _better(mode)(known, key=lambda entry: entry[2])
        epoch, step, value = history[-1]
        return dataclasses.replace(
            self, epoch=epoch, step=step, value=value, best=best[2], best_epoch=best[0], history=history
        )

    def moved(
        self,
        values: Mapping[str, Any],
        generation: int,
        history: tuple[tuple[float, int, float], ...],
        step: int,
        mode: Mode,
    ) -> Trial:
        """The trial after it was moved to another trial's weights.

        Args:
            values: its new parameters.
            generation: number of its moves, including this one.
            history: (epoch, step, metric) of each validation of the weights, which are now its own.
            step: of the weights. Of what was measured on its former weights, the best one up to this step stays known;
                later ones depend on how far it was ahead of others when it was moved.
            mode: whether a larger or a smaller value is better.
        """
        measured = [(self.generation, *entry) for entry in self.history if entry[1] <= step]
        left = _better(mode)(
            measured if self.left is None else (self.left, *measured), key=lambda entry: entry[3], default=None
        )
        moved = dataclasses.replace(self, values=dict(values), generation=generation, left=left)
        return moved.with_history(history, mode)


def trial_name(number: int) -> str:
    """Name of the trial that is created as number ``number``, from 0."""
    return f"t{number:03d}"


def run_name(trial: str, generation: int) -> str:
    """Name of a trial's run after so many moves."""
    return f"{trial}-g{generation}" if generation else trial


def best_trial(trials: Iterable[Trial], mode: Mode) -> Trial | None:
    """The trial with the best value; the earlier one of two that are equal. None where nothing was measured."""
    measured = [trial for trial in trials if trial.best is not None]
    return _better(mode)(measured, key=lambda trial: trial.best or 0.0) if measured else None


def _better(mode: Mode) -> Callable[..., Any]:
    """The function that chooses the best of several."""
    return max if mode == "max" else min


def write_trials(folder: str, trials: Iterable[Trial]) -> None:
    """Writes all trials into the folder of a search, atomically.

    Args:
        folder: folder or URI.
        trials: all of them.
    """
    content = {"version": _VERSION, "trials": [dataclasses.asdict(trial) for trial in trials]}
    write_bytes(join(folder, TRIALS_FILE), json.dumps(content, indent=1, allow_nan=False).encode())


def read_trials(folder: str) -> list[Trial]:
    """The trials of a search, in the order of creation; none if none were written yet.

    Args:
        folder: folder or URI.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    place = join(folder, TRIALS_FILE)
    if file_info(place).type == fs.FileType.NotFound:
        return []
    try:
        content = json.loads(read_bytes(place))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, and this program reads version {_VERSION}")
        return [_trial(entry) for entry in content["trials"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: cannot be read as trials: {error}") from error


def _trial(entry: Mapping[str, Any]) -> Trial:
    if entry["state"] not in STATES:
        raise ValueError(f"unknown state {entry['state']!r}")
    history = tuple((epoch, step, value) for epoch, step, value in entry["history"])
    left = None if entry.get("left") is None else tuple(entry["left"])
    return Trial(**{**entry, "history": history, "left": left})
