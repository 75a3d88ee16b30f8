"""The result of a search: its best configuration, how it was reached, and how to train with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detr_ray.addresses import join
from detr_ray.engine.reporting.progress import duration
from detr_ray.search.confirmation import Confirmation
from detr_ray.search.distributions import Distribution
from detr_ray.search.importance import importance
from detr_ray.search.lived_schedule import lived_values
from detr_ray.search.population import Population
from detr_ray.search.space import SearchSpace
from detr_ray.search.tables import ENDED, Ending, final_table, importance_table, train_command
from detr_ray.search.trials import Mode, Trial
from detr_ray.tracking import viewing_hint

BEST_CONFIG = "best.yaml"
SCHEDULE = "schedule.yaml"
EXPLOITS = "exploits.txt"


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        name: of the search.
        path: its folder.
        status: how it ended; one that failed has no result.
        metric: name of the metric.
        mode: whether a larger or a smaller value is better.
        trials: all of them.
        parameters: the searched parameters.
        seconds: of this process.
        best: the best trial, see `measured_best`; None if nothing was measured.
        best_values: key of the configuration -> value of the best trial. A key that changed during its training has the
            schedule of its values.
        tracking_uri: MLflow store of its records; None where it is not tracked.
        exploits: the moves of a population as a table; empty without one.
        parent_run: id of the search's MLflow run; None where there is none.
        report: the page about it; None where none was written.
        on_confirmed: brings onto that page what confirms the best trial; None where nothing was measured.
    """

    name: str
    path: str
    status: Ending
    metric: str
    mode: Mode
    trials: tuple[Trial, ...]
    parameters: Mapping[str, Distribution]
    seconds: float
    best: Trial | None = None
    best_values: Mapping[str, Any] | None = None
    tracking_uri: str | None = None
    exploits: str = ""
    parent_run: str | None = None
    report: str | None = None
    on_confirmed: Callable[[Confirmation], None] | None = None


def measured_best(trial: Trial, population: Population | None) -> Trial:
    """The trial with the run that measured the best value of a trial.

    A moved trial has its donor's measurements up to the move. If the best is one of them, the weights are the donor's,
    of its run at that time, also if it was moved itself since then. If it was better before it was moved, the weights
    are those of the run that it left.

    Args:
        trial: one with a measurement.
        population: the population, if there was one.

    Returns:
        The trial with the name, the number of moves and the values of that run.
    """
    if population is None or trial.name not in population.members:
        return trial
    runs = [(trial.generation, step, value) for _, step, value in trial.history]
    if trial.left is not None:
        left, _, at, measured = trial.left
        runs.append((left, at, measured))
    generation, step = next((generation, step) for generation, step, value in runs if value == trial.best)
    name, generation = population.run_of(trial.name, generation, step)
    _, values = population.ancestry(name, generation)[-1]
    return dataclasses.replace(trial, name=name, generation=generation, values=values)


def best_values(trial: Trial, space: SearchSpace, population: Population | None) -> dict[str, Any]:
    """Key of the configuration -> value of a trial; see `SearchResult`.

    Args:
        trial: one with a measurement.
        space: the space.
        population: the population, if there was one.
    """
    values = space.resolve(trial.values)
    if population is None or trial.name not in population.members:
        return values
    epoch, step, _ = trial.history[-1]
    lived = []
    for first, drawn in population.ancestry(trial.name, trial.generation):
        resolved = space.resolve(drawn)
        lived.append((first, {key: resolved[key] for key in space.mutated_keys}))
    return values | lived_values(lived, round(step / epoch))


def summary(result: SearchResult, files: Sequence[str], overrides: Sequence[str]) -> str:
    """The text for the user at the end.

    Args:
        result: of the search.
        files: the configuration files that were given.
        overrides: the ``key=value`` arguments that were given.
    """
    names = list(result.parameters)
    lines = [
        f"\nsearch {result.name} {ENDED[result.status]} after {duration(result.seconds)}",
        "",
        final_table(result.trials, names, result.metric, result.mode),
        "",
        *([result.exploits, ""] if result.exploits else []),
        importance_table(importance(result.trials, result.parameters)),
        "",
    ]
    if result.best is None or result.best_values is None:
        lines.append(f"no trial gave a value of {result.metric}")
    else:
        lines += [
            f"best              {result.best.run_name}: {result.metric} {result.best.best:.4f}",
            f"train it          {train_command(files, overrides, result.best_values)}",
        ]
    if result.exploits and result.best is not None:
        lines.append(f"its schedule      {join(result.path, SCHEDULE)}")
    if result.status != "finished":
        lines.append(f"go on             the same command with --resume tune.name={result.name}")
    if result.report is not None:
        lines.append(f"report            {result.report}")
    lines.append(f"everything else   {result.path}")
    if result.tracking_uri is not None:
        lines.append(f"curves            {viewing_hint(result.tracking_uri)}")
    return "\n".join(lines)
