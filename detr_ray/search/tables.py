"""Output of a search: tables of its trials during the search and at its end, and the command to train the best."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from detr_ray.config.yaml_format import format_inline
from detr_ray.printable import counted, shortened
from detr_ray.search.importance import Importance
from detr_ray.search.lived_schedule import whole_value
from detr_ray.search.trials import STATES, Mode, Trial

MOST_ROWS = 20
LONGEST_VALUE = 24
LONGEST_PROBLEM = 80

Ending = Literal["finished", "stopped", "out of time", "failed"]
"""How a search ended: ``stopped`` on request; ``out of time``, when `tune.time_budget_s` was over; both can go on."""
ENDED: Mapping[Ending, str] = {
    "finished": "finished",
    "stopped": "was stopped",
    "out of time": "ran out of time",
    "failed": "failed",
}
"""The same for readers, to go on with ``after 3 min``."""


def trial_table(trials: Sequence[Trial], names: Sequence[str], metric: str, mode: Mode, most: int = MOST_ROWS) -> str:
    """The trials, the best first, then those that were not measured, in the order of creation.

    Args:
        trials: all of them.
        names: the parameters, each a column.
        metric: name of the metric; its last part is the title of the column.
        mode: whether a larger or a smaller metric is better.
        most: rows; a last line counts the trials that are not shown.
    """
    rows = [_row(trial, names) for trial in sorted_trials(trials, mode)]
    short = metric.removeprefix("val/")
    head = ["trial", "state", "epoch", short, f"best {short}", *short_names(names)]
    lines = aligned([head, *rows[:most]])
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more")
    lines.append(f"{counted(len(trials), 'trial')}: {state_counts(trials)}" if trials else "no trials yet")
    return "\n".join(lines)


def final_table(trials: Sequence[Trial], names: Sequence[str], metric: str, mode: Mode) -> str:
    """All trials, with the reasons for failed and refused ones.

    Args:
        trials: all of them.
        names: the parameters, each a column.
        metric: name of the metric.
        mode: whether a larger or a smaller metric is better.
    """
    problems = [
        f"{trial.name} {trial.state}: {shortened(' '.join(trial.problem.split()), LONGEST_PROBLEM * 3)}"
        for trial in trials
        if trial.problem
    ]
    return "\n".join([trial_table(trials, names, metric, mode, most=max(len(trials), 1)), *problems])


def sorted_trials(trials: Sequence[Trial], mode: Mode) -> list[Trial]:
    """The best first; trials without a metric last. Equal ones stay in the order of creation."""
    sign = -1 if mode == "max" else 1
    return sorted(trials, key=lambda trial: (trial.best is None, sign * (trial.best or 0.0)))


def state_counts(trials: Sequence[Trial]) -> str:
    """For example ``5 finished, 2 stopped early, 1 failed``."""
    counts = Counter(trial.state for trial in trials)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])  # type: ignore[index]


def importance_table(found: Importance) -> str:
    """The importance of each parameter, its measure, and the uncertainty with this number of trials."""
    if not found.parameters:
        return found.reservation
    head = ["parameter", "importance", "p", "measure"]
    rows = [
        [one.name, f"{one.value:+.2f}" if one.value < 0 else f"{one.value:.2f}", _p(one.p_value), one.measure]
        for one in found.parameters
    ]
    return "\n".join([*aligned([head, *rows]), found.reservation])


def train_command(files: Sequence[str], overrides: Sequence[str], values: Mapping[str, Any]) -> str:
    """The command that trains a configuration by itself, for a POSIX shell.

    Args:
        files: the configuration files of the search, as they were given.
        overrides: the ``key=value`` arguments of the search, as they were given; those of ``tune`` are left out.
        values: dotted key -> value of the trial (`SearchSpace.resolve`).
    """
    whole = {key: whole_value(value) for key, value in values.items()}
    kept = [item for item in overrides if not item.removeprefix("--").startswith(("tune.", "tune="))]
    parts = ["python", "-m", "detr_ray.train"]
    for file in files:
        parts += ["--config", file]
    parts += [*kept, *(f"{key}={format_inline(value)}" for key, value in whole.items())]
    return shlex.join(parts)


def short_names(names: Sequence[str]) -> list[str]:
    """The names without their first parts, as far as they stay different: ``lr`` for ``optim.lr``."""
    found = []
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1) if not parts[start].isdigit()]
        others = [other for other in names if other != name]
        found.append(next((end for end in endings if not any(_ends_with(other, end) for other in others)), name))
    return found


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _row(trial: Trial, names: Sequence[str]) -> list[str]:
    best = "" if trial.best is None else f"{trial.best:.4f}"
    if trial.best_epoch is not None and trial.best_epoch != trial.epoch:
        best += f" (epoch {trial.best_epoch:g})"
    value = "" if trial.value is None else f"{trial.value:.4f}"
    values = [_shown(trial.values[key]) if key in trial.values else "" for key in names]
    return [trial.run_name, trial.state, f"{trial.epoch:.4g}", value, best, *values]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return shortened(format_inline(value), LONGEST_VALUE)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
