"""New settings of a population from a model of what was gained (PB2)."""

from __future__ import annotations

import math
import random

import pytest

from detr_ray.search.distributions import Distribution
from detr_ray.search.guided_changes import FEWEST_GAINS, Gain, guided_change

PARAMETERS = {"optim.lr": Distribution("loguniform", 1e-5, 1e-1), "loss.giou": Distribution("uniform", 1.0, 4.0)}


def gains(best_lr: float, count: int = 30) -> list[Gain]:
    """Parts of trials that gain the more the nearer their rate is to the best one, whatever the other weight is."""
    chance = random.Random(1)
    values = [{name: found.draw(chance) for name, found in PARAMETERS.items()} for _ in range(count)]
    return [
        Gain(number // 6 + 1, one, -abs(math.log10(one["optim.lr"]) - math.log10(best_lr)))
        for number, one in enumerate(values)
    ]


@pytest.mark.parametrize("best_lr", [1e-4, 1e-2])
def test_it_finds_the_setting_that_gained_most(best_lr: float) -> None:
    start = {"optim.lr": 1e-3, "loss.giou": 2.0, "model.dropout": 0.1}
    found = guided_change(start, random.Random(7), PARAMETERS, gains(best_lr), 7)
    assert found is not None
    assert abs(math.log10(found["optim.lr"]) - math.log10(best_lr)) < 0.5
    assert found["model.dropout"] == 0.1 and 1 <= found["loss.giou"] <= 4


def test_the_same_chance_finds_the_same() -> None:
    start = {"optim.lr": 1e-3, "loss.giou": 2.0}
    found = [guided_change(start, random.Random(seed), PARAMETERS, gains(1e-3), 7) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_too_little_is_known_at_first() -> None:
    start = {"optim.lr": 1e-3, "loss.giou": 2.0}
    few = gains(1e-3, FEWEST_GAINS)
    assert guided_change(start, random.Random(3), PARAMETERS, few[1:], 2) is None
    spoiled = [Gain(1, few[0].values, math.nan), *few[1:]]
    assert guided_change(start, random.Random(3), PARAMETERS, spoiled, 2) is None
    assert guided_change(start, random.Random(3), PARAMETERS, few, 2) is not None
