"""The population that a configuration describes: a moved trial gets values that the search allows."""

from __future__ import annotations

import random
from typing import Any

import pytest
from search.spaces import searching

from detr_ray.search import SearchSpace
from detr_ray.search import new_population as module
from detr_ray.search.guided_changes import FEWEST_GAINS, guided_change
from detr_ray.search.new_population import new_population
from detr_ray.search.population import Population, Report

BOTH = {"loss.ce": {"uniform": [1, 4]}, "loss.giou": {"uniform": [1, 4]}}
NARROW = "tune.constraints=['loss.ce <= loss.giou']"
ANEW = "tune.resample_probability=1"


def population(*settings: str) -> tuple[Population, SearchSpace]:
    config = searching(BOTH, "train.epochs=9", "tune.trials=4", "tune.quantile=0.5", "eval.every_epochs=1", *settings)
    space = SearchSpace.from_config(config)
    made = new_population(config, space)
    assert made is not None
    for number in range(4):
        made.add(f"t{number:03d}", {"loss.ce": 1.0 + number / 8, "loss.giou": 1.5 + number / 8})
    return made, space


def rounds(made: Population, count: int) -> None:
    """Each trial is better than the one before it, and gains more."""
    for epoch in range(1, count + 1):
        for number, (name, member) in enumerate(list(made.members.items())):
            made.report(name, member.generation, Report(epoch, epoch * 5, number * epoch, f"/{name}/{epoch}"))


def test_only_populations_have_one() -> None:
    config = searching(BOTH)
    assert new_population(config, SearchSpace.from_config(config)) is None


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_changes_keep_the_constraints(scheduler: str) -> None:
    """Half of the draws, and half of what a model finds promising, break it."""
    settings = (f"tune.scheduler={scheduler}", ANEW)
    made, _ = population(*settings, NARROW)
    rounds(made, 6)
    assert len(made.moves) == 12
    assert all(move.new["loss.ce"] <= move.new["loss.giou"] for move in made.moves)
    free, _ = population(*settings)
    rounds(free, 6)
    assert any(move.new["loss.ce"] > move.new["loss.giou"] for move in free.moves), "otherwise nothing is tested"


def test_where_all_changes_are_refused_the_donors_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one try, about half of all moves."""
    monkeypatch.setattr(module, "CHANGES_TRIED", 1)
    made, _ = population("tune.scheduler=pbt", ANEW, NARROW)
    rounds(made, 6)
    same = [move.new == made.members[move.donor].values for move in made.moves]
    assert len(same) == 12 and 2 < sum(same) < 10
    assert all(move.new["loss.ce"] <= move.new["loss.giou"] for move in made.moves)


def test_pb2_learns_from_the_gains_of_the_population() -> None:
    """The first round knows no gains: values change at random. From the second on, the model chooses."""
    made, space = population("tune.scheduler=pb2", "tune.perturb_every_epochs=2")
    values: dict[str, Any] = {}
    for epoch in (2, 4):
        if epoch == 4:
            values = {name: dict(member.values) for name, member in made.members.items()}
        for number, (name, member) in enumerate(list(made.members.items())):
            made.report(name, member.generation, Report(epoch, epoch * 5, epoch * (4.0 - number), f"/{name}/{epoch}"))
    first, second = made.moves[:2], made.moves[2:]
    assert all(move.epoch == 2 for move in first) and all(move.epoch == 4 for move in second) and second
    assert len(made.gains) == 4 == FEWEST_GAINS
    for move in second:
        chance = random.Random(f"0 4 {move.receiver}")
        chance.choice(range(2))
        donor = values[move.donor]
        assert move.new == guided_change(donor, chance, space.parameters, made.gains, 6)
