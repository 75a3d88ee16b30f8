"""Keys of the section `tune`, seen in the trials that a search would make, and in how trials of a population change."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from config_keys.registry import Place, shows

from detr_ray.config import Config, ConfigError
from detr_ray.runtime.search.directory import open_search
from detr_ray.runtime.search.schedulers import build_scheduler
from detr_ray.runtime.search.session import trials_on_this_machine
from detr_ray.search import SearchSpace
from detr_ray.search.book import Book
from detr_ray.search.new_population import new_population
from detr_ray.search.population import Report

RATE = "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"
GRID = ("tune.space={optim.lr: {grid: [1e-4, 1e-3]}, loss.ce: {grid: [1, 2]}}", "tune.searcher=grid")


def proposed(config: Config, count: int = 5) -> list[dict[str, Any] | None]:
    space = SearchSpace.from_config(config)
    return [space.proposal(number, config.tune) for number in range(count)]


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_config(config)
    return str(caught.value)


@shows("tune.space")
def space(place: Place) -> None:
    """A trial is the base with drawn values; a variable enters through expressions only."""
    config = place.config(
        "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}, factor: {choice: [0.5]}, "
        "optim.lr_backbone: {expression: optim.lr * factor}}"
    )
    found = SearchSpace.from_config(config)
    trial = found.trial_config(config, found.draw(random.Random(1)))
    assert 1e-5 <= trial.optim.lr <= 1e-3 and trial.optim.lr != config.optim.lr
    assert trial.optim.lr_backbone == trial.optim.lr * 0.5
    assert trial.tune == Config().tune and trial.model == config.model


@shows("tune.constraints")
def constraints(place: Place) -> None:
    config = place.config(RATE, "tune.constraints=['optim.lr < 1e-4']")
    found = SearchSpace.from_config(config)
    assert found.trial_config(config, {"optim.lr": 2e-5}).optim.lr == 2e-5
    with pytest.raises(ConfigError, match=r"'optim\.lr < 1e-4' does not hold"):
        found.trial_config(config, {"optim.lr": 5e-4})


@shows("tune.seed")
def seed(place: Place) -> None:
    one, again, other = (proposed(place.config(RATE, f"tune.seed={number}")) for number in (1, 1, 2))
    assert one == again != other


@shows("tune.trials")
def number_of_trials(place: Place) -> None:
    """A grid is searched whole, or not at all."""
    SearchSpace.from_config(place.config(*GRID, "tune.trials=4"))
    assert "set tune.trials=4" in refused(place.config(*GRID, "tune.trials=3"))


@shows("tune.searcher")
def searcher(place: Place) -> None:
    points = [point and tuple(point.values()) for point in proposed(place.config(*GRID))]
    assert points == [(1e-4, 1), (1e-4, 2), (1e-3, 1), (1e-3, 2), None]
    assert "needs tune.searcher=grid" in refused(place.config(GRID[0]))


@shows("tune.metric")
def metric(place: Place) -> None:
    SearchSpace.from_config(place.config(RATE, "tune.metric=val/APs"))
    assert "val/loss is never reported" in refused(place.config(RATE, "tune.metric=val/loss"))


@shows("tune.grace_epochs")
def grace_epochs(place: Place) -> None:
    SearchSpace.from_config(place.config(RATE, "tune.scheduler=asha", "train.epochs=2", "tune.grace_epochs=2"))
    said = refused(place.config(RATE, "tune.scheduler=asha", "train.epochs=2", "tune.grace_epochs=3"))
    assert "must not exceed train.epochs (2)" in said


@shows("tune.perturb_every_epochs")
def perturb_every_epochs(place: Place) -> None:
    SearchSpace.from_config(place.config(RATE, "tune.scheduler=pbt", "train.epochs=4", "tune.perturb_every_epochs=2"))
    said = refused(place.config(RATE, "tune.scheduler=pbt", "train.epochs=4", "tune.perturb_every_epochs=4"))
    assert "must be less than train.epochs (4)" in said


BOTH = "tune.space={optim.lr: {uniform: [1e-5, 1e-3]}, loss.giou: {uniform: [1, 8]}}"


@shows("tune.scheduler", "tune.mutate")
def mutated(place: Place) -> None:
    """A population changes values while trials train; the others do not."""
    many = "train.epochs=4"
    assert SearchSpace.from_config(place.config(BOTH, many, "tune.scheduler=asha")).mutated == ()
    assert SearchSpace.from_config(place.config(BOTH, many, "tune.scheduler=pbt")).mutated == ("optim.lr", "loss.giou")
    config = place.config(BOTH, many, "tune.scheduler=pbt", "tune.mutate=[loss.giou]", "tune.resample_probability=0")
    before = {"optim.lr": 1e-4, "loss.giou": 4.0}
    after = SearchSpace.from_config(config).perturb(before, random.Random(0), config.tune)
    assert after["optim.lr"] == 1e-4 and after["loss.giou"] != 4.0


@shows("tune.perturb_factors", "tune.resample_probability")
def perturbation(place: Place) -> None:
    def changed(*overrides: str) -> set[float]:
        config = place.config(BOTH, "train.epochs=4", "tune.scheduler=pbt", *overrides)
        found, rng = SearchSpace.from_config(config), random.Random(3)
        before = {"optim.lr": 1e-4, "loss.giou": 4.0}
        return {found.perturb(before, rng, config.tune)["loss.giou"] for _ in range(40)}

    assert changed("tune.resample_probability=0") == {3.2, 5.0}
    assert changed("tune.resample_probability=0", "tune.perturb_factors=[0.5, 1.5]") == {2.0, 6.0}
    assert len(changed("tune.resample_probability=1")) == 40


@shows("tune.name")
def name(place: Place) -> None:
    """The name is the folder, and a search of that name is not begun again."""
    config = place.config(RATE, "tune.name=mine")
    opened = open_search(config, {}, resume=False)
    assert opened.path == str(place.folder / "runs" / "mine")
    with opened.locked(print):
        assert (place.folder / "runs" / "mine" / "search.json").is_file()
    with pytest.raises(ConfigError, match="a search 'mine' exists"):
        open_search(config, {}, resume=False)
    assert open_search(config, {}, resume=True) == opened
    assert open_search(place.config(RATE), {}, resume=False).name != "mine"


def stopped(config: Config, *values: float) -> list[int]:
    """The last epoch of trials that have these values all the time, one after another."""
    scheduler, ends = build_scheduler(config.tune, config.train.epochs, []), []
    for number, value in enumerate(values):
        trial = SimpleNamespace(trial_id=str(number), config={"trial": f"t{number:03d}"})
        scheduler.on_trial_add(None, trial)
        results = ({"epoch": epoch, "value": value} for epoch in range(1, config.train.epochs))
        ends.append(next((one["epoch"] for one in results if scheduler.on_trial_result(None, trial, one) == "STOP"),
                         config.train.epochs))  # fmt: skip
    return ends


@shows("tune.mode", "tune.reduction_factor")
def better_ones_go_on(place: Place) -> None:
    """One of so many at each stage; those with more, or with less."""

    def ends(*overrides: str) -> list[int]:
        return stopped(place.config(RATE, "tune.scheduler=asha", "train.epochs=9", *overrides), 0.6, 0.5, 0.55, 0.7)

    assert ends() == [9, 1, 1, 9]
    assert ends("tune.mode=min") == [9, 9, 1, 1]
    assert ends("tune.reduction_factor=2") == [9, 1, 2, 9]


@shows("tune.quantile")
def quantile(place: Place) -> None:
    """How many of eight trials are moved in a round."""

    def moved(*overrides: str) -> int:
        config = place.config(RATE, "tune.scheduler=pbt", "train.epochs=4", "tune.trials=8", *overrides)
        population = new_population(config, SearchSpace.from_config(config))
        assert population is not None
        for number in range(8):
            population.add(f"t{number:03d}", {"optim.lr": 1e-4})
        return sum(
            len(population.report(name, 0, Report(1, 5, number / 8, "a"))) for number, name in
            enumerate(list(population.members))
        )  # fmt: skip

    assert moved() == 2 and moved("tune.quantile=0.5") == 4 and moved("tune.quantile=0.1") == 1


@shows("tune.max_concurrent")
def max_concurrent(place: Place) -> None:
    with mock.patch("os.cpu_count", return_value=6):
        assert trials_on_this_machine(place.config(RATE), 1) == 6
        assert trials_on_this_machine(place.config(RATE, "tune.max_concurrent=2"), 1) == 2


@shows("tune.max_trial_failures")
def max_trial_failures(place: Place) -> None:
    """How often a trial that fails waits for another start."""
    for overrides, states in (((), ["waiting", "failed"]), (("tune.max_trial_failures=0",), ["failed"])):
        tune = place.config(RATE, *overrides).tune
        book = Book(str(place.folder), tune.mode, tune.max_trial_failures)
        book.add({})
        for state in states:
            book.start("t000")
            assert book.fail("t000", "a fault", again=True).state == state
