"""Changes of a population's settings, chosen by a model of earlier gains (PB2) instead of at random.

Parker-Holder et al., 2020, "Provably Efficient Online Hyperparameter Optimization with Population-Based Bandits": a
Gaussian process learns, from each part of each trial, the gain of the metric as a function of settings and time; the
settings with the highest upper confidence bound are tried next. The kernel here is a squared exponential with a length
for each setting and for time.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from detr_ray.search.distributions import Distribution

FEWEST_GAINS = 4
"""With fewer gains, a model is useless, and settings are changed at random."""

CANDIDATES = 500
MOST_TRIED = 50
"""So many of the most promising candidates are tried, if the configuration or a constraint refuses some."""

OPTIMISM = 1.0
"""Standard deviations that are added to the expected gain."""


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain of the metric in one part of a trial.

    Attributes:
        epoch: at the end of the part.
        values: the settings in it.
        gain: how much better the metric became; negative where it became worse.
    """

    epoch: int
    values: Mapping[str, Any]
    gain: float


def guided_change(
    values: Mapping[str, Any],
    chance: random.Random,
    parameters: Mapping[str, Distribution],
    gains: Sequence[Gain],
    epoch: int,
    is_possible: Callable[[Mapping[str, Any]], bool] = lambda values: True,
) -> dict[str, Any] | None:
    """The most promising settings from an epoch on.

    Args:
        values: settings of the trial that is copied; those that are no ``parameters`` stay.
        chance: random state; the same state gives the same settings.
        parameters: the parameters to change: ``uniform`` and ``loguniform`` ones.
        gains: the known gains.
        epoch: from which on the settings hold.
        is_possible: whether a trial can have these settings.

    Returns:
        Name -> value; None if there are too few gains, or none of the most promising settings is possible.
    """
    known = [gain for gain in gains if math.isfinite(gain.gain)]
    if len(known) < FEWEST_GAINS:
        return None
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    last = max(epoch, *(gain.epoch for gain in known))
    inputs = np.array([[*_places(gain.values, parameters), gain.epoch / last] for gain in known])
    gained = np.array([gain.gain for gain in known])
    kernel = ConstantKernel() * RBF(np.full(inputs.shape[1], 0.5), (0.05, 10.0)) + WhiteKernel(0.1, (1e-3, 1.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=chance.getrandbits(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at the end of its range is acceptable
        model.fit(inputs, gained)
    drawn = [{name: found.draw(chance) for name, found in parameters.items()} for _ in range(CANDIDATES)]
    mean, deviation = model.predict(
        np.array([[*_places(one, parameters), epoch / last] for one in drawn]), return_std=True
    )
    promising = np.argsort(-(mean + OPTIMISM * deviation), kind="stable")[:MOST_TRIED]
    candidates = ({**values, **drawn[place]} for place in promising)
    return next((candidate for candidate in candidates if is_possible(candidate)), None)


def _places(values: Mapping[str, Any], parameters: Mapping[str, Distribution]) -> list[float]:
    """Positions of values in their ranges, from 0 to 1."""
    return [_place(float(values[name]), found) for name, found in parameters.items()]


def _place(value: float, distribution: Distribution) -> float:
    low, high = (float(end) for end in distribution.ends())
    if distribution.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)
