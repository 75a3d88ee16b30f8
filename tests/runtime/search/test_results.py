"""What a search says at its end, and the configuration of its best trial."""

from __future__ import annotations

import dataclasses
import random
import shlex
from typing import Any

import pytest
import yaml
from search.spaces import searching

from detr_ray.config import Schedule, load_config
from detr_ray.runtime.search.results import SearchResult, best_values, measured_best, summary
from detr_ray.search import SearchSpace, Trial
from detr_ray.search.lived_schedule import schedule_file
from detr_ray.search.population import Population, Report, Values
from detr_ray.search.space import with_values

SPACE: dict[str, Any] = {
    "optim.lr": {"uniform": [0.125, 8]},
    "optim.lr_backbone": {"expression": "optim.lr / 2"},
    "loss.giou": {"uniform": [1, 4]},
}
CONFIG = searching(SPACE, "tune.scheduler=pbt", "train.epochs=4", "tune.mutate=[optim.lr]")


def trained(name: str, values: Values, epochs: int = 4, state: Any = "finished", generation: int = 0) -> Trial:
    trial = Trial(name, values, state, generation=generation)
    for epoch in range(1, epochs + 1):
        trial = trial.measured(epoch, epoch * 5, epoch / 8, "max")
    return trial


def moved() -> Population:
    """t001 went on from t000 after epoch 1, with another rate."""

    def change(values: Values, chance: random.Random) -> Values:
        return {**values, "optim.lr": 0.5}

    population = Population(2, change, every_epochs=1, epochs=4, quantile=0.5, mode="max", seed=0)
    population.add("t000", {"optim.lr": 1.0, "loss.giou": 2.0})
    population.add("t001", {"optim.lr": 4.0, "loss.giou": 3.0})
    population.report("t000", 0, Report(1, 5, 0.5, "a"))
    assert len(population.report("t001", 0, Report(1, 5, 0.25, "b"))) == 1
    return population


def test_without_a_population_the_best_values_are_those_of_the_trial() -> None:
    space = SearchSpace.from_config(CONFIG)
    trial = trained("t000", {"optim.lr": 1.0, "loss.giou": 2.0})
    assert best_values(trial, space, None) == {"optim.lr": 1.0, "optim.lr_backbone": 0.5, "loss.giou": 2.0}


@pytest.mark.parametrize("epochs", [2, 4])
def test_the_best_of_a_population_has_the_schedule_that_its_weights_lived_through(epochs: int) -> None:
    """What changed is a schedule, also through expressions; the receiver's other values are the donor's."""
    space, population = SearchSpace.from_config(CONFIG), moved()
    best = trained("t001", population.members["t001"].values, epochs, generation=1)
    schedule = {"points": [[0.0, 1.0], [1.0, 0.5]], "interpolation": "constant"}
    half = {"points": [[0.0, 0.5], [1.0, 0.25]], "interpolation": "constant"}
    values = best_values(best, space, population)
    assert values == {"optim.lr": schedule, "optim.lr_backbone": half, "loss.giou": 2.0}
    assert yaml.safe_load(schedule_file(values)) == {
        "optim": {"lr": schedule, "lr_backbone": half}, "loss": {"giou": 2.0},
    }  # fmt: skip
    with_values(CONFIG, values)
    unmoved = best_values(trained("t000", {"optim.lr": 1.0, "loss.giou": 2.0}), space, population)
    assert unmoved == {"optim.lr": 1.0, "optim.lr_backbone": 0.5, "loss.giou": 2.0}


def test_the_schedule_changes_at_the_step_of_the_move() -> None:
    """Three steps an epoch: a third is no binary fraction, and the quotient is that of the training loop."""
    space = SearchSpace.from_config(CONFIG)
    population = moved()
    population.moves[0] = dataclasses.replace(population.moves[0], step=4)
    values = population.members["t001"].values
    best = Trial("t001", values, "finished", generation=1).measured(4, 12, 0.5, "max")
    assert best_values(best, space, population)["optim.lr"]["points"] == [[0.0, 1.0], [4 / 3, 0.5]]


def test_the_best_weights_of_a_moved_trial_may_be_those_of_its_donor() -> None:
    population = moved()
    inherited = Trial("t001", {"optim.lr": 0.5}, "failed", generation=1).measured(1, 5, 0.5, "max")
    for trial in (inherited, inherited.measured(2, 10, 0.25, "max")):
        best = measured_best(trial, population)
        assert (best.run_name, best.values) == ("t000", {"optim.lr": 1.0, "loss.giou": 2.0}) and best.best == 0.5
    own = inherited.measured(2, 10, 0.75, "max")
    assert measured_best(own, population).run_name == "t001-g1"
    left = dataclasses.replace(inherited, best=0.75, left=(0, 1, 5, 0.75))
    best = measured_best(left, population)
    assert (best.run_name, best.values) == ("t001", {"optim.lr": 4.0, "loss.giou": 3.0}), "before it was moved"
    assert measured_best(own, None) == own


TRIALS = (
    trained("t000", {"optim.lr": 1.0, "loss.giou": 2.0}),
    trained("t001", {"optim.lr": 4.0, "loss.giou": 3.0}, 2, "stopped early"),
    Trial("t002", {"optim.lr": 2.0, "loss.giou": 1.0}, "failed", "the loss is not finite"),
)


def result(**changes: Any) -> SearchResult:
    space = SearchSpace.from_config(CONFIG)
    values = best_values(TRIALS[0], space, None)
    whole = SearchResult(
        "mine", "/runs/mine", "finished", "val/AP", "max", TRIALS, space.parameters, 61.0, TRIALS[0], values
    )
    return dataclasses.replace(whole, **changes)


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


def test_summary_of_a_finished_search() -> None:
    text = summary(result(), ["configs/quickstart.yaml"], ["tune.trials=3", "train.epochs=4"])
    assert "search mine finished after 1 min 1 s" in text.splitlines()
    assert "3 trials: 1 finished, 1 stopped early, 1 failed" in text
    assert "t002 failed: the loss is not finite" in text and "too few to say which settings matter" in text
    assert line_of(text, "best  ") == "t000: val/AP 0.5000"
    assert line_of(text, "everything else") == "/runs/mine"
    for absent in ("--resume", "curves", "its schedule", "\nreport "):
        assert absent not in text
    assert line_of(summary(result(report="/runs/mine/report.html"), [], []), "report  ") == "/runs/mine/report.html"
    _, _, command, option, file, *overrides = shlex.split(line_of(text, "train it"))
    assert (command, option, file) == ("detr_ray.train", "--config", "configs/quickstart.yaml")
    assert overrides[0] == "train.epochs=4" and not [item for item in overrides if item.startswith("tune")]
    config = load_config(None, ["data.root=/data", *overrides])
    assert (config.optim.lr, config.optim.lr_backbone, config.loss.giou) == (1.0, 0.5, 2.0)


def test_the_command_of_the_best_has_mappings_that_are_no_schedules() -> None:
    values = {"optim.lr_factors": {"model.encoder": 0.5}, "loss.giou": {"points": [[0, 2], [9, 3.0]]}}
    text = summary(result(best_values=values), [], [])
    *_, factors, giou = shlex.split(line_of(text, "train it"))
    config = load_config(None, ["data.root=/data", factors, giou])
    assert config.optim.lr_factors == {"model.encoder": 0.5} and isinstance(config.loss.giou, Schedule)


def test_summary_of_a_stopped_search_says_how_to_go_on() -> None:
    text = summary(result(status="stopped"), [], [])
    assert "search mine was stopped after" in text
    assert line_of(text, "go on") == "the same command with --resume tune.name=mine"


def test_summary_of_a_population_has_its_moves_and_its_schedule() -> None:
    text = summary(result(exploits="epoch  trial\n1      t001-g1", tracking_uri="sqlite:////runs/mlflow.db"), [], [])
    assert "epoch  trial\n1      t001-g1\n" in text
    assert line_of(text, "its schedule") == "/runs/mine/schedule.yaml"
    assert "sqlite:////runs/mlflow.db" in line_of(text, "curves")


def test_summary_without_a_measurement() -> None:
    text = summary(result(trials=TRIALS[2:], best=None, best_values=None), [], [])
    assert "no trial gave a value of val/AP" in text and "train it" not in text and "/runs/mine" in text
