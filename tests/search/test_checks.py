"""What is wrong with a search is said before it starts, all of it at once."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from search.spaces import faults, searching, space_of

from detr_ray.config import Schedule, config_from_dict
from detr_ray.config.yaml_format import parse_yaml
from detr_ray.search import SearchSpace
from detr_ray.search.searchable import NOT_SEARCHED, fault_of_key

RATE = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}


def test_what_is_right_is_not_refused() -> None:
    assert faults(RATE) == []
    assert faults(RATE, "tune.scheduler=asha", "tune.grace_epochs=2", "train.epochs=2") == []
    assert faults(RATE, "tune.scheduler=pbt", "tune.perturb_every_epochs=2", "train.epochs=3") == []
    assert faults({"run.seed": {"randint": [0, 99]}, "train.epochs": {"choice": [10, 20]}}) == []
    assert faults(RATE, "tune.searcher=tpe", "tune.metric=val/AP/traffic light") == []


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space: is empty"),
        ({"optim.lrr": {"uniform": [0, 1]}}, "optim.lrr: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"loss": {"uniform": [0, 1]}}, "tune.space: loss: is a section; name one of its keys"),
        ({"data.augment": {"choice": [1]}}, "tune.space: data.augment: is a section"),
        ({"loss.giou.points": {"choice": [1]}}, "write its whole value with a distribution inside"),
        ({"optim.lr": {"uniform": [2, 1]}}, "tune.space: optim.lr: the range of uniform is reversed: 2 to 1"),
        ({"loss.giou": {"points": [[0, {"loguniform": [0, 1]}]]}}, "giou.points.0.1: loguniform needs a range above 0"),
        ({"optim.lr": 1e-4}, "optim.lr: holds nothing to search (got 0.0001)"),
        ({"optim.lr": {"logunifrom": [1, 2]}}, "there is no distribution 'logunifrom'; did you mean 'loguniform'?"),
        ({"lr": {"uniform": [0, 1]}}, "no expression uses it as a variable; did you mean 'optim.lr'"),
        ({"a b": {"uniform": [0, 1]}}, "a b: cannot be the name of a variable"),
        ({"max": {"uniform": [0, 1]}}, "max: cannot be the name of a variable"),
        ({**RATE, "loss.ce": {"expression": "optim.lr * factr"}}, "'optim.lr * factr': unknown key 'factr'"),
        ({"loss.ce": {"expression": [1]}}, "loss.ce: must be {expression: TEXT} (got {expression: [1]})"),
        ({**RATE, "loss.ce": {"expression": "import os"}}, "'import os' is no expression"),
        ({**RATE, "loss.ce": {"expression": "optim.schedule"}}, "optim.schedule is no number in the base"),
        ({"optim.schedule": {"choice": ["a"]}, "loss.ce": {"expression": "optim.schedule"}}, "is not always a number"),
        ({"loss.ce": {"expression": "loss.bbox"}, "loss.bbox": {"expression": "loss.ce"}}, "depend on each other in"),
        ({"x": {"choice": [0]}, "loss.ce": {"expression": "1 / x"}}, "x: 0 is refused: tune.space: loss.ce: '1 / x'"),
        ({"optim.gamma": {"uniform": [2, 3]}}, "optim.gamma: 2.0 is refused: optim.gamma: must be at most 1 "),
        ({"model.num_queries": {"uniform": [10, 20]}}, "must be a whole number (got 10.0, from this trial); use rand"),
        ({"model.backbone": {"choice": ["vgg"]}}, "model.backbone: vgg is refused: model.backbone: must be resnet18, "),
    ],
)  # fmt: skip
def test_faults_of_the_space(space: dict[str, Any], message: str) -> None:
    found = faults(space)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.scheduler=asha", "tune.grace_epochs=9"], "tune.grace_epochs: must not exceed train.epochs (8) (got 9)"),
        (["tune.scheduler=median", "tune.grace_epochs=9"], "tune.grace_epochs: must not exceed"),
        (["tune.scheduler=pbt", "tune.perturb_every_epochs=8"], "perturb_every_epochs: must be less than train.epochs"),
        (["tune.scheduler=pbt", "eval.every_epochs=2"], "tune.perturb_every_epochs: must be a multiple of eval."),
        (["tune.scheduler=pbt", "tune.trials=1"], "tune.trials: must be at least 2"),
        (["tune.scheduler=pbt", "tune.max_concurrent=7"], "tune.max_concurrent: must not be less than tune.trials (8)"),
        (["tune.scheduler=pbt", "tune.mutate=[optim.ls]"], "no parameter 'optim.ls'; did you mean 'optim.lr'?"),
        (["tune.scheduler=pbt", "tune.mutate=[]"], "tune.mutate: names nothing"),
        (["tune.scheduler=pbt", "train.early_stopping={}"], "train.early_stopping: must be null with tune.sch"),
        (["tune.scheduler=pbt", "tune.searcher=tpe"], "tune.searcher: must be random or grid"),
        (["tune.scheduler=asha", "eval.every_epochs=0"], "eval.every_epochs: must not be 0 with tune.scheduler=asha"),
        (["tune.metric=val/ap"], "tune.metric: val/ap is never reported; there are val/AP, "),
        (["tune.metric=val/AP/"], "is never reported"),
        (["data.root=null", "data.train={shards: /d}"], "tune.metric: val/AP needs validation images: set data.val"),
        (["data.root=null"], "data.root: no training data is given"),
        (["tune.constraints=['optim.lr <']"], "tune.constraints: 'optim.lr <' is no expression"),
        (["tune.constraints=['optim.lr < x']"], "tune.constraints: 'optim.lr < x': unknown key 'x'"),
        (["tune.constraints=['optim.lr > 1']"], "tune.constraints: none of 200 combinations fulfils all"),
        (["train.micro_batch_size=auto"], "train.micro_batch_size: auto would count the same free memory for each of"),
        (["run.fork_from=runs/a"], "run.fork_from: must be null in a search"),
        (["tune.searcher=grid"], "tune.searcher: grid needs grids alone, but optim.lr would be drawn"),
    ],
)  # fmt: skip
def test_faults_of_the_settings(overrides: list[str], message: str) -> None:
    found = faults(RATE, "train.epochs=8", *overrides)
    assert len(found) == 1 and message in found[0], found


def test_the_settings_of_other_schedulers_are_not_looked_at() -> None:
    assert faults(RATE, "tune.grace_epochs=999", "tune.perturb_every_epochs=999", "eval.every_epochs=0") == []
    assert faults(RATE, "tune.scheduler=asha", "tune.perturb_every_epochs=999") == []


def test_a_micro_batch_is_found_where_one_trial_has_the_memory_for_itself() -> None:
    for alone in ("tune.max_concurrent=1", "train.use_gpu=true"):
        assert faults(RATE, "train.micro_batch_size=auto", alone) == []


def test_grids_are_for_the_grid() -> None:
    grid = {"optim.lr": {"grid": [1, 2, 3]}, "loss.ce": {"grid": [1, 2, 3]}}
    assert faults(grid, "tune.searcher=grid", "tune.trials=9") == []
    (message,) = faults(grid, "tune.searcher=grid", "tune.trials=9", "tune.constraints=['optim.lr > 3']")
    assert "none of 9 combinations" in message
    assert faults(grid, "tune.searcher=grid") == ["tune.trials: the grid has 9 points; set tune.trials=9 (got 8)"]
    (message,) = faults(grid)
    assert message.startswith("tune.searcher: optim.lr, loss.ce is a grid, which needs tune.searcher=grid")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.num_queries": {"randint": [10, 20]}}, "model.num_queries cannot change while a trial trains; name "),
        ({"optim.weight_decay": {"uniform": [0, 1]}}, "optim.weight_decay cannot change while a trial trains"),
        ({"loss.giou": {"points": [[0, {"uniform": [1, 4]}]]}}, "loss.giou.points.0.1 is a part of a schedule"),
        ({"x": {"uniform": [0, 1]}, "model.dropout": {"expression": "x / 2"}}, "model.dropout (through x) cannot"),
        ({"optim.lr_backbone": {"uniform": [0, 1]}}, "optim.lr_backbone must not become 0 while a trial trains"),
        ({"f": {"quniform": [0, 1, 1]}, "optim.lr_backbone": {"expression": "f"}}, "f: optim.lr_backbone must"),
        ({**RATE, "train.epochs": {"choice": [5, 6]}}, "train.epochs: cannot be searched with tune.scheduler=pbt"),
    ],
)  # fmt: skip
def test_only_rates_and_loss_weights_change_while_trials_train(space: dict[str, Any], message: str) -> None:
    found = faults(space, "tune.scheduler=pbt", "train.epochs=9")
    assert any(message in line for line in found), found


def test_what_is_mutated_is_drawn() -> None:
    space = {"optim.lr": {"uniform": [2, 1]}, "loss.ce": {"uniform": [1, 2]}, "loss.bbox": {"expression": "loss.ce"},
             "loss.giou": {"points": [[0, {"uniform": [1, 4]}]]}}  # fmt: skip
    pbt = ("tune.scheduler=pbt", "train.epochs=9")
    assert faults(space, *pbt, "tune.mutate=[optim.lr, loss.ce]") == [
        "tune.space: optim.lr: the range of uniform is reversed: 2 to 1"
    ], "its own fault is enough"
    del space["optim.lr"]
    assert faults(space, *pbt, "tune.mutate=[loss.bbox, loss.giou]") == [
        "tune.mutate: loss.bbox is not drawn itself; name what it uses",
        "tune.mutate: loss.giou is not drawn itself; name loss.giou.points.0.1",
    ]
    (unknown,) = faults(space, *pbt, "tune.mutate=[loss.ce, model.dropout]")
    assert unknown == ("tune.mutate: there is no parameter 'model.dropout'; there are loss.ce, loss.giou.points.0.1")


def test_the_rest_of_the_space_may_be_anything_if_it_does_not_change() -> None:
    space = {**RATE, "model.num_queries": {"randint": [10, 20]}, "loss.giou": {"points": [[0, {"uniform": [1, 4]}]]}}
    assert faults(space, "tune.scheduler=pbt", "train.epochs=9", "tune.mutate=[optim.lr]") == []
    assert faults({"loss.giou": {"uniform": [0, 4]}}, "tune.scheduler=pbt", "train.epochs=9") == [], "0 is a weight"


def test_all_faults_are_told_at_once() -> None:
    space = {
        "optim.lrr": {"uniform": [0, 1]}, "loss.ce": {"uniform": [1, 1]}, "optim.gamma": {"uniform": [2, 3]},
        "train.num_workers": {"choice": [1, 2]},
    }  # fmt: skip
    found = faults(space, "tune.scheduler=asha", "tune.grace_epochs=900", "tune.metric=loss", "tune.constraints=['(']")
    for part in ("optim.lrr", "loss.ce", "optim.gamma", "train.num_workers", "grace_epochs", "tune.metric", "'('"):
        assert any(part in line for line in found), part


def test_a_remedy_is_named_where_it_is_one() -> None:
    assert faults({"model.num_queries": {"uniform": [10, 20]}})[0].endswith("from this trial); use randint")
    assert not any("randint" in line for line in faults({"model.num_queries": {"uniform": [10.5, 20]}}))
    assert not any("randint" in line for line in faults({"optim.gamma": {"uniform": [2, 3]}}))


def test_one_refused_end_is_a_warning() -> None:
    space = space_of({"optim.lr": {"uniform": [0, 1]}})
    assert space.warnings == (
        "tune.space: optim.lr: 0.0 is refused: optim.lr: must be more than 0 (got 0.0, from this trial)",
    )
    heads = space_of({"model.num_heads": {"choice": [8, 7]}})
    assert len(heads.warnings) == 1 and "num_heads: 7 is refused" in heads.warnings[0]


def test_a_value_that_needs_another_parameter_is_no_fault() -> None:
    """`multistep` needs milestones, which the base has not and the space has."""
    space = {"optim.schedule": {"choice": ["multistep"]}, "optim.milestones": [{"uniform": [5, 9]}]}
    assert space_of(space).warnings == ()
    assert "must name at least one epoch" in faults({"optim.schedule": {"choice": ["multistep"]}})[0]


def test_keys_that_are_not_searched_exist_and_say_why() -> None:
    for key, reason in NOT_SEARCHED.items():
        example = {"run.": "run.name", "tune.": "tune.seed", "tracking.": "tracking.uri", "eval.": "eval.size",
                   "data.train.": "data.train.images", "data.val.": "data.val.images",
                   "data.generate.": "data.generate.seed", "data.split.": "data.split.val",
                   "train.early_stopping.": "train.early_stopping.patience"}.get(key, key)  # fmt: skip
        assert fault_of_key(example) == reason
    assert fault_of_key("run.seed") is None and fault_of_key("data.window") is None


def test_optuna_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert faults(RATE, "tune.searcher=tpe") == [
        "tune.searcher: tpe needs the package optuna: pip install 'detr_ray[tune]'"
    ]
    assert "scikit-learn" in faults(RATE, "tune.scheduler=pb2", "train.epochs=9")[0]


def test_a_search_is_checked_without_torch_ray_and_mlflow() -> None:
    code = "import sys, detr_ray.search; sys.exit(bool({'torch', 'ray', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_checked_space_is_the_same_as_before() -> None:
    config = searching(RATE)
    assert SearchSpace.from_config(config) == SearchSpace.from_config(config)


def test_the_example_of_the_page_is_sound() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    blocks = re.findall(r"\n\n((?: {4}.*\n)+)", page)
    (example,) = [textwrap.dedent(block) for block in blocks if block.lstrip().startswith("tune:")]
    config = config_from_dict({**parse_yaml(example), "data": {"root": "/data"}}, "the page")
    space = SearchSpace.from_config(config)
    assert len(space.parameters) == 5 and len(space.constraints) == 1 and space.warnings == ()
    (schedule,) = [textwrap.dedent(block) for block in blocks if block.lstrip().startswith("optim:")]
    assert isinstance(config_from_dict(parse_yaml(schedule), "the page").optim.lr, Schedule)
