"""A run that begins as a fork of another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from observing import small_config
from recorded import final_weights
from tiny import fit_here, make_dataset

from detr_ray.config import Config, ConfigError
from detr_ray.engine.checkpoints.fork import find_fork
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import choose_label_space, prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker

STOPPED_AT, STEPS = 3, 8
KEYS = (
    "train.epochs=2",
    "optim.ema_decay=0.9",
    "optim.schedule=step",
    "optim.step_epochs=1",
    "train.log_every_steps=1",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=4)


@pytest.fixture(scope="module")
def donors(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one configuration: one to its end, and one that was stopped in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("donors")
    fit_here(config(dataset, folder, "run.name=whole"))
    fit_here(config(dataset, folder, "run.name=stopped"), stop_after=STOPPED_AT)
    return folder


def config(dataset: Path, folder: Path, *overrides: str) -> Config:
    return small_config(dataset, folder, *KEYS, *overrides)


def fork(dataset: Path, folder: Path, donor: Path, *overrides: str) -> Config:
    return config(dataset, folder, "run.name=fork", f"run.fork_from={donor}", *overrides)


def model_file(run: Path, step: int, content: str = "model.pt") -> dict:
    store = CheckpointStore(str(run / "checkpoints"))
    (info,) = [info for info in store.checkpoints() if info.step == step]
    return store.load(info, content)


def begin(config: Config) -> TrainingLoop:
    """The loop of a run before its first step."""
    job = prepare_job(config, lambda line: None)
    return TrainingLoop(job, LocalContext(), LocalBatches(job.data.plan(1, 0), *job.data.loaders()), MemoryTracker())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_fork_with_the_same_settings_is_the_other_run(dataset: Path, donors: Path, tmp_path: Path) -> None:
    loop = begin(fork(dataset, tmp_path, donors / "stopped", "run.name=look"))
    at_start = model_file(donors / "stopped", STOPPED_AT)
    assert loop.step == STOPPED_AT and loop.state.ema is not None
    assert same(dict(loop.model.state_dict()), at_start["model"])
    assert same(dict(loop.state.ema.module.state_dict()), at_start["ema"])
    moments = loop.optimizer.state_dict()["state"]
    saved = model_file(donors / "stopped", STOPPED_AT, "training.pt")["optimizer"]["state"]
    assert moments.keys() == saved.keys() and all(same(moments[key], saved[key]) for key in moments)

    result = fit_here(fork(dataset, tmp_path, donors / "stopped"))
    assert (result.status, result.step) == ("finished", STEPS)
    assert same(final_weights(tmp_path / "fork", STEPS), final_weights(donors / "whole", STEPS))
    ours, theirs = (model_file(run, STEPS) for run in (tmp_path / "fork", donors / "whole"))
    assert same(ours["ema"], theirs["ema"])


def test_a_fork_has_rates_and_weights_of_its_own_from_its_first_step(
    dataset: Path, donors: Path, tmp_path: Path
) -> None:
    tracker = MemoryTracker()
    changed = ("optim.lr=0.007", "optim.lr_backbone=0.002", "optim.weight_decay=0.3", "loss.giou=9", "train.epochs=3")
    config = fork(dataset, tmp_path, donors / "stopped", *changed)
    result = fit_here(config, tracker)
    assert result.step == 12
    assert tracker.history("optim/lr")[0] == (STOPPED_AT + 1, 0.007)
    assert tracker.history("optim/lr")[1:3] == [(5, pytest.approx(0.0007)), (6, pytest.approx(0.0007))], (
        "the schedule's"
    )
    assert tracker.history("optim/lr_backbone")[0] == (STOPPED_AT + 1, 0.002)
    assert tracker.history("loss/weight/giou")[0] == (STOPPED_AT + 1, 9)
    groups = model_file(tmp_path / "fork", 12, "training.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.3}
    assert not same(final_weights(tmp_path / "fork", 12), final_weights(donors / "whole", STEPS))


def test_a_checkpoint_may_be_named_and_the_latest_is_taken_of_a_run(
    dataset: Path, donors: Path, tmp_path: Path
) -> None:
    steps = [info.step for info in CheckpointStore(str(donors / "whole" / "checkpoints")).checkpoints()]
    assert steps[0] < STEPS
    named = donors / "whole" / "checkpoints" / f"step_{steps[0]:08d}"
    assert begin(fork(dataset, tmp_path, named)).step == steps[0]
    longer = fork(dataset, tmp_path / "b", donors / "whole", "train.epochs=3")
    assert begin(longer).step == STEPS


def test_a_fork_that_goes_on_needs_the_other_run_no_more(dataset: Path, donors: Path, tmp_path: Path) -> None:
    donor = shutil.copytree(donors / "stopped", tmp_path / "donor")
    begun = prepare_job(fork(dataset, tmp_path, donor), lambda line: None)
    assert json.loads((tmp_path / "fork" / "run.json").read_text())["forked_from"] == begun.fork.path  # type: ignore[union-attr]
    later = shutil.copytree(donors / "whole" / "checkpoints" / "step_00000008", donor / "checkpoints" / "step_00000008")
    stopped = fit_here(fork(dataset, tmp_path, donor), stop_after=2)
    assert stopped.step == STOPPED_AT + 2, "it began at the checkpoint that was the latest then"
    assert later.is_dir()
    shutil.rmtree(donor)
    finished = fit_here(fork(dataset, tmp_path, donor))
    assert (finished.status, finished.step) == ("finished", STEPS)
    assert same(final_weights(tmp_path / "fork", STEPS), final_weights(donors / "whole", STEPS))


def test_labels_are_those_of_the_other_run(dataset: Path, donors: Path, tmp_path: Path) -> None:
    donor = shutil.copytree(donors / "stopped", tmp_path / "donor")
    record = json.loads((donor / "run.json").read_text())
    (donor / "run.json").write_text(json.dumps(record | {"label_space": "coco91"}))
    config = fork(dataset, tmp_path, donor)
    found = find_fork(config, None)
    train = prepare_job(fork(dataset, tmp_path / "other", donors / "stopped"), lambda line: None).data.train
    assert found is not None and train is not None
    assert choose_label_space(config, train, lambda: False, None, found) == "coco91"
    assert choose_label_space(config, train, lambda: True, None) == "contiguous"


def test_a_checkpoint_that_is_damaged_ends_the_run(dataset: Path, donors: Path, tmp_path: Path) -> None:
    donor = shutil.copytree(donors / "stopped", tmp_path / "donor")
    path = donor / "checkpoints" / f"step_{STOPPED_AT:08d}" / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFailed, match=r"run.fork_from: the run cannot begin at .*hash differs"):
        begin(fork(dataset, tmp_path, donor))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("model.dim_feedforward=48", "model.dim_feedforward: the other run has 32, this one 48"),
        ("model.dropout=0.3", "model.dropout: the other run has 0.1, this one 0.3"),
        ("train.global_batch_size=2", "train.global_batch_size: the other run has 4, this one 2"),
        ("run.seed=7", "run.seed: the other run has 42, this one 7"),
        ("data.augment.flip=0.1", "data.augment.flip: the other run has 0.5, this one 0.1"),
        ("optim.ema_decay=0", "optim.ema_decay: the other run has 0.9, this one 0"),
        ("train.max_steps=3", "train.epochs: this run ends after step 3, and the checkpoint is of step 3"),
        ("other data", "the train data: other annotations than the other run has"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(
    dataset: Path, donors: Path, tmp_path: Path, changed: str, named: str
) -> None:
    if changed == "other data":
        dataset, changed = make_dataset(tmp_path / "data", num_train=16, num_val=4, seed=9), "train.use_gpu=false"
    with pytest.raises(ConfigError) as refused:
        prepare_job(fork(dataset, tmp_path / "runs", donors / "stopped", changed), lambda line: None)
    assert named in str(refused.value).splitlines()[1], str(refused.value)
    assert len(str(refused.value).splitlines()) == 2, "nothing else is named"
    assert not (tmp_path / "runs").exists(), "no run is begun"


def test_a_backbone_that_was_frozen_cannot_train(dataset: Path, tmp_path: Path) -> None:
    keys = ("optim.lr_backbone=0", "optim.freeze=[class_embed]")
    fit_here(config(dataset, tmp_path, "run.name=frozen", *keys), stop_after=1)
    with pytest.raises(ConfigError) as refused:
        prepare_job(fork(dataset, tmp_path, tmp_path / "frozen"), lambda line: None)
    assert "optim.freeze: the other run has '[class_embed]', this one '[]'" in str(refused.value)
    assert "optim.lr_backbone: the other run has 0" in str(refused.value)
    fit_here(config(dataset, tmp_path, "run.name=trained"), stop_after=1)
    result = fit_here(fork(dataset, tmp_path, tmp_path / "trained", *keys))
    assert result.step == STEPS


def test_what_is_no_run_is_refused(dataset: Path, donors: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint in one"):
        prepare_job(fork(dataset, tmp_path, tmp_path / "nothing"), lambda line: None)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(donors / "stopped" / "run.json", empty)
    for place in (empty, donors / "stopped" / "checkpoints" / "step_00000001"):
        with pytest.raises(ConfigError, match=f"run.fork_from: {place} holds no whole checkpoint"):
            prepare_job(fork(dataset, tmp_path, place), lambda line: None)
