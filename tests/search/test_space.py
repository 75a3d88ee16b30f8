"""From a space in YAML to the configurations of trials."""

from __future__ import annotations

import random
from typing import Any

import pytest
from search.spaces import searching, space_of

from detr_ray.config import Config, ConfigError, Schedule, TuneConfig
from detr_ray.search import SearchSpace
from detr_ray.search.space import with_values

WHOLE = {
    "optim.lr_backbone": {"expression": "optim.lr * factor"},
    "factor": {"uniform": [0.05, 1]},
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.giou": {"points": [[0, 2], [{"randint": [5, 20]}, {"uniform": [1, 4]}]], "interpolation": "cosine"},
    "optim.milestones": [{"uniform": [5, 10]}, {"expression": "round(log10(1000)) * 5"}],
    "optim.schedule": {"choice": ["multistep", "cosine"]},
    "loss.ce": {"points": [[0, {"expression": "end / 2"}], [9, {"expression": "end"}]]},
    "end": {"choice": [2, 4]},
}


def test_parameters_have_the_names_of_their_places() -> None:
    space = space_of(WHOLE)
    assert set(space.parameters) == {
        "factor", "optim.lr", "loss.giou.points.1.0", "loss.giou.points.1.1", "optim.milestones.0", "optim.schedule",
        "end",
    }  # fmt: skip
    assert (space.parameters["optim.lr"].low, space.parameters["optim.lr"].high) == (1e-5, 1e-3)
    assert space.warnings == () and space.mutated == () and space.mutated_keys == ()


def test_a_trial_is_the_base_with_its_values_in_their_places() -> None:
    config = searching(WHOLE, "train.epochs=30", "run.seed=7", "tune.trials=3")
    space = SearchSpace.from_config(config)
    drawn = {
        "factor": 0.5, "optim.lr": 4e-4, "loss.giou.points.1.0": 6, "loss.giou.points.1.1": 3.5,
        "optim.milestones.0": 5.5, "optim.schedule": "multistep", "end": 4,
    }  # fmt: skip
    trial = space.trial_config(config, drawn, {"name": "t000", "storage": "runs/search", "fork_from": None})
    assert (trial.optim.lr, trial.optim.lr_backbone) == (4e-4, 2e-4)
    assert trial.optim.milestones == (5.5, 15) and trial.optim.schedule == "multistep"
    assert trial.loss.giou == Schedule(points=((0, 2), (6, 3.5)), interpolation="cosine")
    assert trial.loss.ce == Schedule(points=((0, 2), (9, 4)))
    assert (trial.run.name, trial.run.storage, trial.run.seed, trial.run.fork_from) == ("t000", "runs/search", 7, None)
    assert trial.tune == TuneConfig()
    untouched = ("data", "model", "train", "eval", "tracking")
    assert all(getattr(trial, section) == getattr(config, section) for section in untouched)
    assert (trial.loss.bbox, trial.optim.weight_decay) == (config.loss.bbox, config.optim.weight_decay)
    assert set(space.resolve(drawn)) == set(WHOLE) - {"factor", "end"}, "variables are no keys"


def test_the_same_seed_draws_the_same_trials() -> None:
    space = space_of(WHOLE)
    first, again, other = (space.draw(random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == set(space.parameters)


def test_a_number_takes_the_place_of_a_schedule_and_the_other_way_round() -> None:
    base = ("loss.giou={points: [[0, 1], [9, 2]], interpolation: cosine}", "optim.lr=1e-4")
    space = {
        "loss.giou": {"uniform": [1, 4]},
        "optim.lr": {"points": [[0, 1e-3], [9, {"loguniform": [1e-5, 1e-4]}]]},
    }
    config = searching(space, *base)
    trial = SearchSpace.from_config(config).trial_config(config, {"loss.giou": 3.0, "optim.lr.points.1.1": 2e-5})
    assert trial.loss.giou == 3.0
    assert trial.optim.lr == Schedule(points=((0, 1e-3), (9, 2e-5)))
    config = searching({"loss.giou": {"points": [[0, {"uniform": [1, 4]}]]}}, base[0])
    trial = SearchSpace.from_config(config).trial_config(config, {"loss.giou.points.0.1": 3.0})
    assert trial.loss.giou == Schedule(points=((0, 3),)), "nothing is left of the base's, not its interpolation either"


def test_expressions_use_numbers_of_the_base() -> None:
    config = searching({"model.dim_feedforward": {"expression": "model.hidden_dim * times"}, "times": {"choice": [4]}})
    space = SearchSpace.from_config(config)
    assert space.trial_config(config, {"times": 4}).model.dim_feedforward == 1024


def test_a_section_that_is_null_by_default_gets_its_keys() -> None:
    assert (
        with_values(searching({"optim.lr": {"uniform": [0, 1]}}), {"data.generate.seed": 3}).data.generate is not None
    )


@pytest.mark.parametrize(
    ("base", "keys", "expected"),
    [
        ((), {"model.architecture": "dino"}, ("model.architecture=dino",)),
        (("model.architecture=dino",), {"model.architecture": "detr"}, ()),
        (
            ("model.architecture=deformable_detr", "model.num_queries=100"),
            {"model.two_stage": True, "loss.class_loss": "vfl"},
            ("model.architecture=deformable_detr", "model.num_queries=100", "model.two_stage=true",
             "loss.class_loss=vfl"),
        ),
    ],
)  # fmt: skip
def test_defaults_follow_from_what_a_trial_sets(
    base: tuple[str, ...], keys: dict[str, Any], expected: tuple[str, ...]
) -> None:
    """An architecture has its published model's defaults, and so has a class loss."""
    trial = with_values(searching({"optim.lr": {"uniform": [0, 1]}}, *base), keys)
    meant = searching({}, *expected)
    assert (trial.model, trial.loss) == (meant.model, meant.loss)


def test_a_broken_constraint_and_a_refused_value_are_configuration_errors() -> None:
    space = {"optim.lr": {"uniform": [1e-5, 1e-3]}, "optim.lr_backbone": {"uniform": [0, 1e-3]}}
    config = searching(space, "tune.constraints=['optim.lr_backbone <= optim.lr', 'loss.giou < 5']")
    found = SearchSpace.from_config(config)
    assert found.trial_config(config, {"optim.lr": 1e-3, "optim.lr_backbone": 1e-4}).optim.lr == 1e-3
    with pytest.raises(ConfigError) as caught:
        found.trial_config(config, {"optim.lr": 1e-4, "optim.lr_backbone": 2e-4})
    assert caught.value.errors == [
        "tune.constraints: 'optim.lr_backbone <= optim.lr' does not hold (optim.lr_backbone=0.0002, optim.lr=0.0001)"
    ]
    with pytest.raises(ConfigError, match=r"optim\.lr: must be more than 0 \(got -1.*from this trial\)"):
        found.trial_config(config, {"optim.lr": -1, "optim.lr_backbone": -2})
    with pytest.raises(ValueError, match=r"no value is given for optim\.lr_backbone"):
        found.trial_config(config, {"optim.lr": 1})


def test_what_a_training_would_refuse_is_refused_before() -> None:
    space = {"model.backbone_norm": {"choice": ["batch", "frozen"]}}
    config = searching(space, "model.backbone_weights=none", "model.backbone_norm=batch")
    found = SearchSpace.from_config(config)
    assert ["frozen batch norm cannot train" in line for line in found.warnings] == [True]
    with pytest.raises(ConfigError, match="frozen batch norm cannot train"):
        found.trial_config(config, {"model.backbone_norm": "frozen"})


def test_a_grid_has_every_combination_once() -> None:
    space = space_of(
        {"optim.lr": {"grid": [1, 2]}, "loss.ce": {"grid": [5, 6, 7]}, "loss.bbox": {"expression": "loss.ce * 2"}},
        "tune.searcher=grid",
    )
    points = space.grid_points()
    assert [tuple(point.values()) for point in points] == [(1, 5), (1, 6), (1, 7), (2, 5), (2, 6), (2, 7)]
    assert space.resolve(points[1]) == {"optim.lr": 1, "loss.ce": 6, "loss.bbox": 12}


def test_proposals_follow_the_seed_and_need_no_results() -> None:
    config = searching({"optim.lr": {"uniform": [1, 2]}}, "tune.trials=4", "tune.seed=3")
    space = SearchSpace.from_config(config)
    proposed = [space.proposal(number, config.tune) for number in (2, 0, 1)]
    assert proposed == [space.proposal(number, TuneConfig(seed=3, trials=9)) for number in (2, 0, 1)]
    assert len({tuple(values.values()) for values in proposed if values}) == 3
    assert space.proposal(0, TuneConfig(seed=4)) != space.proposal(0, TuneConfig(seed=3))
    with pytest.raises(ValueError, match="needs the results of earlier trials"):
        space.proposal(0, TuneConfig(searcher="tpe"))


# Populations

POPULATION: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "optim.lr_backbone": {"expression": "optim.lr * 0.1"},
    "loss.giou": {"quniform": [1, 4, 0.5]},
    "loss.ce": {"choice": [1, 2, 4, 8]},
    "model.num_queries": {"choice": [50, 100]},
}
PBT = ("tune.scheduler=pbt", "train.epochs=9", "tune.mutate=[optim.lr, loss.giou, loss.ce]")


def test_expressions_over_what_changes_change_too() -> None:
    space = space_of(POPULATION, *PBT)
    assert space.mutated == ("optim.lr", "loss.giou", "loss.ce")
    assert set(space.mutated_keys) == {"optim.lr", "optim.lr_backbone", "loss.giou", "loss.ce"}


def test_a_perturbation_stays_in_the_space_and_leaves_the_rest() -> None:
    config = searching(POPULATION, *PBT, "tune.resample_probability=0")
    space, rng = SearchSpace.from_config(config), random.Random(0)
    drawn = {"optim.lr": 9e-4, "loss.giou": 1.5, "loss.ce": 4, "model.num_queries": 50}
    changed = [space.perturb(drawn, rng, config.tune) for _ in range(50)]
    assert {one["optim.lr"] for one in changed} == {9e-4 * 0.8, 1e-3}, "the range ends at 1e-3"
    assert {one["loss.giou"] for one in changed} == {1.0, 2.0}, "at least a step"
    assert {one["loss.ce"] for one in changed} == {2, 8}, "a neighbour"
    assert {one["model.num_queries"] for one in changed} == {50}
    assert drawn["optim.lr"] == 9e-4
    for end, reached in ((1, {1, 2}), (8, {4, 8})):
        changed = [space.perturb({**drawn, "loss.ce": end}, rng, config.tune) for _ in range(50)]
        assert {one["loss.ce"] for one in changed} == reached, "the list ends there"


def test_a_perturbation_is_at_least_a_step() -> None:
    config = searching({"loss.giou": {"quniform": [1, 9, 2]}}, *PBT[:2], "tune.resample_probability=0")
    space, rng = SearchSpace.from_config(config), random.Random(0)
    assert {space.perturb({"loss.giou": 3}, rng, config.tune)["loss.giou"] for _ in range(30)} == {1, 5}
    assert {space.perturb({"loss.giou": 9}, rng, config.tune)["loss.giou"] for _ in range(30)} == {7, 9}


def test_a_value_may_be_drawn_anew() -> None:
    config = searching(POPULATION, *PBT, "tune.resample_probability=1")
    space = SearchSpace.from_config(config)
    drawn = {"optim.lr": 9e-4, "loss.giou": 1.5, "loss.ce": 4, "model.num_queries": 50}
    changed = [space.perturb(drawn, random.Random(seed), config.tune) for seed in range(30)]
    assert len({one["optim.lr"] for one in changed}) == 30
    assert {one["loss.ce"] for one in changed} == {1, 2, 4, 8}
    assert {one["model.num_queries"] for one in changed} == {50}


def test_the_base_is_left_as_it_is() -> None:
    config = searching(WHOLE)
    before = config.to_yaml()
    space = SearchSpace.from_config(config)
    space.trial_config(config, space.draw(random.Random(0)))
    assert config.to_yaml() == before and isinstance(config, Config)
