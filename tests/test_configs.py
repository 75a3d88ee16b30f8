"""Every recipe in ``configs/``: loads, dumps, can be trained, and its header's commands are real.

Run alone: ``pytest tests/test_configs.py``. Needs no torch.
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from detr_ray.config import Config, diff, flatten, load_config
from detr_ray.search import SearchSpace

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.name)
def recipe(request) -> Path:
    return request.param


def header_of(recipe: Path) -> str:
    lines = recipe.read_text().splitlines()
    head = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in head).replace("\\\n", "")


def test_the_recipes_are_there():
    assert {"detr_r50.yaml", "detr_r50_dc5.yaml", "detr_r101.yaml", "coco128.yaml"} <= {path.name for path in RECIPES}


def test_recipe_loads_and_dumps(recipe, tmp_path):
    config = load_config(recipe)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(config.to_yaml())
    assert load_config(dumped) == config


def test_recipe_can_be_trained(recipe):
    config = load_config(recipe)
    if config.data.root is None and config.data.train is None:
        config = load_config(recipe, ["data.root=/data/coco"])
    config.check_training()


def test_header_says_how_to_run_the_recipe(recipe):
    header = header_of(recipe)
    commands = re.findall(r"python -m detr_ray\.(\w+)((?: --config \S+)+)(.*)", header)
    assert ("tune" if recipe.parent.name == "tune" else "train") in [command for command, _, _ in commands]
    for command, files, arguments in commands:
        assert importlib.util.find_spec(f"detr_ray.{command}") is not None
        paths = [ROOT / path for path in files.split()[1::2] if "/SEARCH/" not in path]
        assert paths[-1] == recipe
        load_config(paths, arguments.split())
    assert "Needs:" in header
    assert "Gives:" in header
    # Every key=value that a header recommends exists and is valid.
    load_config(recipe, re.findall(r"\b[a-z]+\.[a-z_]+=[\w./:-]*\w", header))


@pytest.mark.parametrize("name", ["detr_r50", "detr_r50_dc5", "detr_r101"])
def test_official_recipes_differ_from_the_defaults_only_where_they_say(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    expected = {
        "detr_r50": [],
        "detr_r50_dc5": [
            "model.dilation: false -> true",
            "train.micro_batch_size: null -> 1",
            "eval.batch_size: 4 -> 1",
        ],
        "detr_r101": ["model.backbone: resnet50 -> resnet101"],
    }
    assert diff(Config(), config) == expected[name]


SEARCHES = [recipe for recipe in RECIPES if recipe.parent.name == "tune"]
BUDGET = {
    "data.max_images", "optim.ema_decay", "train.epochs", "train.num_workers", "train.log_every_steps",
    "tracking.experiment",
}  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES, ids=lambda path: path.name)
def test_searches_are_sound_and_of_the_quickstart_with_a_smaller_budget(search):
    config = load_config(search)
    space = SearchSpace.from_config(config)
    assert space.warnings == ()
    for number in range(20):
        drawn = space.draw(random.Random(number))
        assert space.trial_config(config, drawn).tune == Config().tune
    quickstart = load_config(ROOT / "configs" / "quickstart.yaml")
    differs = {line.partition(":")[0] for line in diff(quickstart, config) if not line.startswith("tune.")}
    allowed = BUDGET | ({"optim.schedule"} if config.tune.scheduler == "pbt" else set())
    assert differs <= allowed
    # The quickstart's own setting is one that the search can find.
    flat = flatten(quickstart)
    for name, distribution in space.parameters.items():
        if name in flat:
            assert distribution.nearest(flat[name]) == flat[name], name


def test_there_is_a_search_of_each_kind():
    assert {path.stem for path in SEARCHES} == {"asha_lr", "pbt_schedules", "optuna_loss_weights"}
    kinds = {(config.tune.searcher, config.tune.scheduler) for config in map(load_config, SEARCHES)}
    assert kinds == {("random", "asha"), ("random", "pbt"), ("tpe", "median")}
