"""The importance of each parameter, estimated from the trials of a search.

A number is judged by Spearman's rank correlation with the metric: whether larger values gave better or worse results. A
choice is judged by the share of the variance of the ranks that lies between its values (eta squared of the
Kruskal-Wallis test). Both consider one parameter at a time: they do not detect interactions of parameters, nor an
optimum in the middle of a range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from detr_ray.config.messages import shown
from detr_ray.search.distributions import Distribution
from detr_ray.search.trials import Trial

FEWEST_TRIALS = 4
"""With fewer trials, ranks are useless."""

SPEARMAN, ETA_SQUARED = "Spearman's rank correlation", "eta squared of the Kruskal-Wallis test"


@dataclass(frozen=True, slots=True)
class ParameterImportance:
    """The importance of one parameter.

    Attributes:
        name: of the parameter.
        measure: `SPEARMAN` or `ETA_SQUARED`.
        value: the correlation, from -1 to 1 (positive: larger values gave a larger metric), or the share, from 0 to 1.
        p_value: probability of a value that large if the parameter did not matter; None where it cannot be computed.
        num_trials: trials that were compared.
    """

    name: str
    measure: str
    value: float
    p_value: float | None
    num_trials: int

    @property
    def strength(self) -> float:
        """Share of the variance of the ranks that the parameter explains, from 0 to 1, for sorting."""
        return self.value**2 if self.measure == SPEARMAN else self.value


@dataclass(frozen=True, slots=True)
class Importance:
    """The importance of all parameters.

    Attributes:
        parameters: the most important first. Parameters that never differed are left out.
        num_trials: trials that were compared.
    """

    parameters: tuple[ParameterImportance, ...]
    num_trials: int

    @property
    def reservation(self) -> str:
        """One sentence about the uncertainty with this number of trials."""
        if self.num_trials < FEWEST_TRIALS:
            trials = "1 trial was" if self.num_trials == 1 else f"{self.num_trials} trials were"
            return f"{trials} compared: too few to say which settings matter."
        return (
            f"{self.num_trials} trials were compared. A correlation below {_smallest_significant(self.num_trials):.2f} "
            "(either sign) occurs with so few in more than one of 20 searches although the setting does not matter, "
            "and among several settings one exceeds it more often."
        )


def importance(trials: Sequence[Trial], parameters: Mapping[str, Distribution]) -> Importance:
    """Compares the values of the trials with their best metric.

    Args:
        trials: of one search. Those without a metric are left out.
        parameters: name -> distribution.
    """
    measured = [trial for trial in trials if trial.best is not None]
    metric = [float(trial.best) for trial in measured if trial.best is not None]
    found = []
    if len(measured) >= FEWEST_TRIALS and len(set(metric)) > 1:
        for name, distribution in parameters.items():
            values = [trial.values.get(name) for trial in measured]
            one = _of_numbers(name, values, metric) if distribution.is_numeric else _of_choice(name, values, metric)
            found += [] if one is None else [one]
    found.sort(key=lambda one: -one.strength)
    return Importance(tuple(found), len(measured))


def _of_numbers(name: str, values: Sequence[Any], metric: Sequence[float]) -> ParameterImportance | None:
    numbers = [float(value) for value in values]
    if len(set(numbers)) < 2:
        return None
    result = stats.spearmanr(numbers, metric)
    correlation, p_value = float(result.statistic), float(result.pvalue)
    return ParameterImportance(name, SPEARMAN, correlation, _finite(p_value), len(metric))


def _of_choice(name: str, values: Sequence[Any], metric: Sequence[float]) -> ParameterImportance | None:
    groups: dict[str, list[float]] = {}
    for value, rank in zip(values, stats.rankdata(metric), strict=True):
        groups.setdefault(shown(value), []).append(float(rank))
    if len(groups) < 2:
        return None
    ranks = np.concatenate([np.asarray(group) for group in groups.values()])
    between = sum(len(group) * (np.mean(group) - ranks.mean()) ** 2 for group in groups.values())
    share = float(between / np.sum((ranks - ranks.mean()) ** 2))
    p_value = float(stats.kruskal(*groups.values()).pvalue)
    return ParameterImportance(name, ETA_SQUARED, share, _finite(p_value), len(metric))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _smallest_significant(num_trials: int) -> float:
    """The rank correlation that has a two-sided p of 0.05, by the usual approximation with Student's t."""
    t = float(stats.t.ppf(0.975, num_trials - 2))
    return t / math.sqrt(num_trials - 2 + t * t)
