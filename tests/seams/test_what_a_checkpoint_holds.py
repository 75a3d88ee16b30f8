"""What a checkpoint holds, and that each part of it is used: by going on, by evaluating, by starting another run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import Observed, observe, prepare, run, small_config, without_validation
from tiny import make_dataset

from detr_ray.config import ConfigError, config_from_dict
from detr_ray.data.errors import DataError
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.validation.evaluation_job import prepare_evaluation

SETTINGS = (
    "run.name=a",
    "optim.ema_decay=0.5",
    "optim.lr=1e-2",
    "optim.lr_backbone=1e-2",
    "optim.schedule=cosine",
    "model.dropout=0.1",
    "data.on_bad_image=skip",
    "train.on_nonfinite=skip",
    "tracking.enabled=false",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=2)


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with a run that was stopped after 2 of 4 steps."""
    storage = tmp_path_factory.mktemp("stopped")
    observe(small_config(dataset, storage, *SETTINGS, *without_validation(dataset)), stop_after=2)
    return storage


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """The same run, never stopped."""
    return observe(small_config(dataset, tmp_path_factory.mktemp("straight"), *SETTINGS, *without_validation(dataset)))


def resumed(
    dataset: Path, stopped: Path, storage: Path, change: Callable[[dict[str, Any]], None], *more: str, step: int = 2
) -> Observed:
    """A copy of the stopped run whose checkpoint was changed, gone on with."""
    shutil.copytree(stopped, storage, dirs_exist_ok=True)
    store = CheckpointStore(str(storage / "a" / "checkpoints"))
    info = store.latest()
    assert info is not None
    files = {name: store.load(info, name) for name in info.files}
    change(files)
    store.save(step, files, info.details)
    return run(prepare(small_config(dataset, storage, *SETTINGS, *without_validation(dataset), *more)))


def final(seen: Observed) -> dict[str, Any]:
    """Everything the last checkpoint holds, flat."""
    _, model_file, training = seen.checkpoint(4)
    return flat({"model.pt": model_file, "training.pt": training})


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict):
        pairs = [(f"{prefix}/{name}", value) for name, value in content.items()]
    elif isinstance(content, list | tuple):
        pairs = [(f"{prefix}/{place}", value) for place, value in enumerate(content)]
    else:
        return {prefix: content}
    return {path: leaf for name, value in pairs for path, leaf in flat(value, name).items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a.keys() | b.keys() if not (name in a and name in b and equal(a[name], b[name]))]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b or "/" in str(a)  # a place, which is another one for each test


def halve(values: Any) -> None:
    for value in values.values():
        if value.is_floating_point():
            value.mul_(0.5)


def halve_moments(files: dict[str, Any], name: str) -> None:
    for state in files["training.pt"]["optimizer"]["state"].values():
        state[name].mul_(0.5)


def set_in(file: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda files: files[file].__setitem__(name, value)


# Entry -> a change of it, and the part of the last checkpoint that is then another one.
GOING_ON: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "model.pt/model": (lambda files: halve(files["model.pt"]["model"]), "/model.pt/model/"),
    "model.pt/ema": (lambda files: halve(files["model.pt"]["ema"]), "/model.pt/ema/"),
    "training.pt/optimizer": (lambda files: halve_moments(files, "exp_avg"), "/model.pt/model/"),
    "training.pt/optimizer (second moments)": (lambda files: halve_moments(files, "exp_avg_sq"), "/model.pt/model/"),
    "training.pt/ema_updates": (set_in("training.pt", "ema_updates", 30), "/model.pt/ema/"),
    "training.pt/bad_image_ids": (set_in("training.pt", "bad_image_ids", [7]), "/training.pt/bad_image_ids"),
}


def test_going_on_is_never_having_stopped(dataset: Path, stopped: Path, straight: Observed, tmp_path: Path) -> None:
    """To the last bit of everything that the checkpoint holds."""
    seen = resumed(dataset, stopped, tmp_path, lambda files: None)
    assert len(seen.updates) == 2 and differing(final(seen), final(straight)) == []
    assert [update.rates for update in seen.updates] == [update.rates for update in straight.updates[2:]]


@pytest.mark.parametrize("entry", GOING_ON)
def test_going_on_uses(dataset: Path, stopped: Path, straight: Observed, tmp_path: Path, entry: str) -> None:
    change, where = GOING_ON[entry]
    seen = resumed(dataset, stopped, tmp_path, change)
    changed = differing(final(seen), final(straight))
    assert any(name.startswith(where) for name in changed), changed


def test_the_step_says_where_to_go_on(dataset: Path, stopped: Path, tmp_path: Path) -> None:
    seen = resumed(dataset, stopped, tmp_path, lambda files: None, step=3)
    assert len(seen.updates) == 1


def test_bad_images_of_before_count(dataset: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"107 different images could not be read"):
        resumed(dataset, stopped, tmp_path, set_in("training.pt", "bad_image_ids", list(range(107))))


def test_updates_that_were_left_out_before_count(dataset: Path, tmp_path: Path) -> None:
    """As many as are allowed were: the next one is one too many."""
    more = ("optim.lr=1e18", "optim.lr_backbone=1e18", "optim.clip_max_norm=0", "train.epochs=2")
    config = small_config(dataset, tmp_path / "stopped", *SETTINGS, *without_validation(dataset), *more)
    assert sum(observe(config, stop_after=3).metric("train/skipped_steps")) == 2
    more = (*more, "train.max_nonfinite_steps=7")
    assert len(resumed(dataset, tmp_path / "stopped", tmp_path / "1", lambda files: None, *more, step=3).training) == 5
    with pytest.raises(RunFailed, match=r"train\.max_nonfinite_steps"):
        resumed(dataset, tmp_path / "stopped", tmp_path / "2", set_in("training.pt", "num_skipped", 7), *more, step=3)


def test_the_scale_of_fp16_is_gone_on_with(dataset: Path, tmp_path: Path) -> None:
    """Without a GPU too: the scaler itself needs none. Few processors are fast in fp16, hence the least of steps."""
    least = ("train.precision=fp16", "train.use_gpu=null", "train.global_batch_size=2", "train.max_steps=2")
    small = ("data.augment={scales: [32], max_size: 48}", *without_validation(dataset))
    config = small_config(dataset, tmp_path, *SETTINGS, *small, *least)
    stopped = observe(config, stop_after=1)
    info, model_file, training = stopped.checkpoint(1)
    training["scaler"] |= {"scale": 2.0, "_growth_tracker": 5}
    stopped.store.save(1, {"model.pt": model_file, "training.pt": training}, info.details)
    found = observe(config).checkpoint(2)[2]["scaler"]
    assert (found["scale"], found["_growth_tracker"]) == (2.0, 6)


def test_each_entry_is_what_its_name_says(straight: Observed) -> None:
    info, model_file, training = straight.checkpoint(4)
    job = straight.job
    state = straight.models[0].state_dict()
    assert model_file["model"].keys() == model_file["ema"].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model_file["model"].items())
    assert model_file["format"] == "detr_ray" and model_file["step"] == training["step"] == info.step == 4
    assert model_file["label_map"] == job.data.label_map.to_dict()
    assert config_from_dict(model_file["config"], "here") == job.config
    assert training["seed"] == job.config.run.seed and training["ema_updates"] == 4
    assert len(training["optimizer"]["state"]) == len([p for p in straight.models[0].parameters() if p.requires_grad])
    assert info.details["global_batch_size"] == 4 and info.details["world_size"] == 1
    assert info.details["epoch"] == pytest.approx(1)


# What other commands take from it


def rewritten(straight: Observed, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = copy.deepcopy(straight.checkpoint(4)[1])
    change(content)
    torch.save(content, path)
    return path


def test_evaluating_takes_the_averaged_weights_the_model_and_the_labels(
    straight: Observed, dataset: Path, tmp_path: Path
) -> None:
    def job_of(change: Callable[[dict[str, Any]], Any]) -> Any:
        path = rewritten(straight, tmp_path / "model.pt", change)
        return prepare_evaluation(small_config(dataset, tmp_path, f"eval.checkpoint={path}"), lambda line: None)

    _, model_file, _ = straight.checkpoint(4)
    name = "class_embed.bias"
    assert torch.equal(job_of(lambda content: None).build_detector().model.state_dict()[name], model_file["ema"][name])
    without = job_of(lambda content: content.pop("ema"))
    assert torch.equal(without.build_detector().model.state_dict()[name], model_file["model"][name])
    with pytest.raises(ConfigError, match="does not fit"):
        job_of(lambda content: content["config"]["model"].__setitem__("hidden_dim", 64))
    with pytest.raises((DataError, ConfigError), match="categories do not fit"):
        job_of(lambda content: content["label_map"]["names"].__setitem__(0, "another"))


def test_another_run_starts_from_the_averaged_weights_by_the_names_of_classes(
    straight: Observed, dataset: Path, tmp_path: Path
) -> None:
    def first_weights(path: Path) -> dict[str, torch.Tensor]:
        config = small_config(dataset, tmp_path, f"model.init_from={path}")
        return prepare_job(config, lambda line: None).build_detector().model.state_dict()

    path = rewritten(straight, tmp_path / "sound.pt", lambda content: None)
    _, model_file, _ = straight.checkpoint(4)
    found = first_weights(path)
    assert all(torch.equal(found[name], value) for name, value in model_file["ema"].items())

    def reverse(content: dict[str, Any]) -> None:
        content["label_map"]["names"].reverse()

    turned = first_weights(rewritten(straight, tmp_path / "turned.pt", reverse))
    rows, before = turned["class_embed.bias"], model_file["ema"]["class_embed.bias"]
    assert torch.equal(rows[:-1], before[:-1].flip(0)) and rows[-1] == before[-1]
