"""Who begins a run, who may write it, and what a run may go on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from starts import start_at_once
from tiny import fit_here, tiny_config

from detr_ray.config import Config, ConfigError, flatten
from detr_ray.engine.checkpoints import run_directory
from detr_ray.engine.checkpoints.found_model import find_model
from detr_ray.engine.checkpoints.run_directory import open_run, read_record
from detr_ray.engine.job import prepare_job
from detr_ray.engine.validation.evaluation_job import prepare_evaluation
from detr_ray.locations import read_bytes


def test_of_many_starts_of_one_new_run_one_goes_on(tmp_path: Path) -> None:
    for number in range(5):
        held, refused = start_at_once(str(tmp_path), f"run-{number}", 10)
        assert len(held) == 1
        run_id, holder = held[0]
        for line in refused:
            assert f"is being written by process {holder} on" in line and "\n" not in line
        folder = tmp_path / f"run-{number}"
        assert json.loads((folder / "run.json").read_text())["run_id"] == run_id
        assert (folder / "config.yaml").read_text() == "optim: {lr: 1}"
        again = open_run(f"run-{number}", str(tmp_path), {"optim.lr": 1.0}, {"train": "abc"}, "")
        assert (again.is_new, again.run_id) == (False, run_id)
        assert not list(folder.glob("*.tmp"))


def test_one_goes_on_where_there_are_no_links_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = open_run("a", str(tmp_path), {}, {}, "")
    assert first.is_new and open_run("a", str(tmp_path), {}, {}, "").run_id == first.run_id


HOLD = """
import sys
from detr_ray.engine.checkpoints.run_directory import open_run
with open_run("a", sys.argv[1], {}, {}, "").locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_is_held_while_its_process_lives_and_no_longer(tmp_path: Path, frozen: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    if frozen:
        process.send_signal(signal.SIGSTOP)
    run = open_run("a", str(tmp_path), {}, {}, "")
    with pytest.raises(ConfigError, match=f"is being written by process {process.pid} on"), run.locked():
        pass
    process.kill()
    process.wait(timeout=30)
    with run.locked():
        pass


def test_a_run_that_is_written_can_be_read(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=a", "train.max_steps=1")
    fit_here(config)
    with prepare_job(config, print).run.locked():
        assert read_record("a", str(tmp_path)) is not None
        assert find_model(str(tmp_path / "a"), "eval.checkpoint").file.endswith("step_00000001/model.pt")
        prepare_evaluation(tiny_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'a'}"), print)


# Runs of other versions


def rewrite_record(run: Path, change: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


def test_a_key_that_came_later_had_its_default(tmp_path: Path) -> None:
    config = flatten(Config())
    open_run("a", str(tmp_path), config, {"train": "x"}, "")

    def strip(record: dict[str, Any]) -> None:
        for key in config:
            if key not in ("run.name", "optim.lr"):
                del record["config"][key]

    rewrite_record(tmp_path / "a", strip)
    said: list[str] = []
    assert not open_run("a", str(tmp_path), config, {"train": "x"}, "", say=said.append).is_new
    assert said == []
    for key, value, before, go_on in (
        ("data.window", 100, "None", "model.init_from to start from its weights"),
        ("optim.ema_decay", 0.9, "0.0", "model.init_from to start from its weights"),
        ("optim.lr_backbone", 0.5, "1e-05", f"run.fork_from={tmp_path}/a to begin it at the last checkpoint of this"),
        ("optim.weight_decay", 0.0, "0.0001", f"run.fork_from={tmp_path}/a to begin it at the last checkpoint of this"),
    ):
        with pytest.raises(ConfigError, match=rf"{key}: begun with {before} \(the default, .*\), now {value}") as error:
            open_run("a", str(tmp_path), {**config, key: value}, {"train": "x"}, "")
        assert go_on in str(error.value)
    with pytest.raises(ConfigError, match=r"optim\.lr: begun with 0\.0001, now 1\.0"):
        open_run("a", str(tmp_path), {**config, "optim.lr": 1.0}, {"train": "x"}, "")


def test_a_key_that_is_gone_is_warned_of(tmp_path: Path) -> None:
    config = flatten(Config())
    open_run("a", str(tmp_path), config, {"train": "x"}, "")
    rewrite_record(tmp_path / "a", lambda record: record["config"].update({"optim.momentum": 0.9}))
    said: list[str] = []
    assert not open_run("a", str(tmp_path), config, {"train": "x"}, "", say=said.append).is_new
    assert len(said) == 1 and "optim.momentum=0.9" in said[0]


def test_a_start_reads_the_record_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=a")
    first = prepare_job(config, lambda line: None).run
    read: list[str] = []

    def counted(location: str) -> bytes:
        read.append(location)
        return read_bytes(location)

    monkeypatch.setattr(run_directory, "read_bytes", counted)
    again = prepare_job(config, lambda line: None).run
    assert first.is_new and not again.is_new and again.run_id == first.run_id
    assert [location for location in read if location.endswith("run.json")] == [f"{tmp_path}/a/run.json"]


def test_free_keys_are_whole_names(tmp_path: Path) -> None:
    """A later key whose name begins as a free one's does is not free."""
    open_run("a", str(tmp_path), {"train.compile": False}, {}, "")
    with pytest.raises(ConfigError, match=r"train\.compile_mode"):
        open_run("a", str(tmp_path), {"train.compile": True, "train.compile_mode": "max"}, {}, "")


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    open_run("a", str(tmp_path), {}, {}, "")
    for content in ("", "[]", "{}", '{"run_id": "x"'):
        (tmp_path / "a" / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json is damaged .*choose another run\.name"):
            open_run("a", str(tmp_path), {}, {}, "")


def test_checkpoints_of_earlier_versions_go_on(dataset: Path, tmp_path: Path) -> None:
    """What a training file may lack has a default; what it holds beside is passed over."""
    from detr_ray.engine.checkpoints.store import CheckpointStore

    settings = ("optim.ema_decay=0.5", "model.dropout=0")
    config = tiny_config(dataset, tmp_path, "run.name=a", *settings)
    fit_here(config, stop_after=3)
    store = CheckpointStore(str(tmp_path / "a" / "checkpoints"))
    info = store.latest()
    assert info is not None
    model, training = store.load(info, "model.pt"), store.load(info, "training.pt")
    store.save(
        3, {"model.pt": model, "training.pt": {"optimizer": training["optimizer"], "of_later": torch.ones(1)}}, {}
    )
    assert fit_here(config).status == "finished"
    fit_here(tiny_config(dataset, tmp_path, "run.name=straight", *settings))
    expected = CheckpointStore(str(tmp_path / "straight" / "checkpoints")).latest()
    found = store.latest()
    assert expected is not None and found is not None
    for name, value in store.load(expected, "model.pt")["model"].items():
        assert torch.equal(value, store.load(found, "model.pt")["model"][name]), name


def test_checkpoints_with_keys_that_are_gone_are_evaluated(dataset: Path, tmp_path: Path) -> None:
    fit_here(tiny_config(dataset, tmp_path, "run.name=a", "train.max_steps=1"))
    path = Path(find_model(str(tmp_path / "a"), "eval.checkpoint").file)
    content = torch.load(path, weights_only=True)
    content["config"]["optim"]["momentum"] = 0.9
    del content["config"]["model"]["dropout"]
    torch.save(content, tmp_path / "other.pt")
    said: list[str] = []
    prepare_evaluation(tiny_config(dataset, tmp_path, f"eval.checkpoint={tmp_path / 'other.pt'}"), said.append)
    assert [line for line in said if "was trained with optim.momentum" in line]


# Where the first weights come from


@pytest.fixture(scope="module")
def begun_once(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """Storage and settings of a run that was begun from a file of weights, has a checkpoint, and whose file is gone."""
    storage = tmp_path_factory.mktemp("begun")
    fit_here(tiny_config(dataset, storage, "run.name=source", "train.max_steps=1"))
    weights = Path(find_model(str(storage / "source"), "eval.checkpoint").file).rename(storage / "weights.pt")
    settings = ("run.name=a", "model.dropout=0", f"model.init_from={weights}")
    fit_here(tiny_config(dataset, storage, *settings), stop_after=3)
    fit_here(tiny_config(dataset, storage, *settings, "run.name=straight"))
    weights.unlink()
    return storage, settings


@pytest.fixture
def begun_from_file(begun_once: tuple[Path, tuple[str, ...]], tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """The same in storage of this test's own."""
    storage, settings = begun_once
    return shutil.copytree(storage, tmp_path, dirs_exist_ok=True), settings


@pytest.mark.parametrize("given", ["the same file", "another file", "nothing"])
def test_first_weights_are_not_needed_to_go_on(
    dataset: Path, begun_from_file: tuple[Path, tuple[str, ...]], given: str
) -> None:
    from recorded import final_weights

    storage, settings = begun_from_file
    other = {
        "the same file": (),
        "another file": ("model.init_from=/nowhere.pt",),
        "nothing": ("model.init_from=null",),
    }
    assert fit_here(tiny_config(dataset, storage, *settings, *other[given])).status == "finished"
    expected = final_weights(storage / "straight", 10)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(storage / "a", 10).items())


def test_first_weights_are_the_same_as_long_as_there_is_no_checkpoint(
    dataset: Path, begun_from_file: tuple[Path, tuple[str, ...]]
) -> None:
    storage, settings = begun_from_file
    for folder in (storage / "a" / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.init_from: begun with '.*weights\.pt', now None"):
        fit_here(tiny_config(dataset, storage, *settings, "model.init_from=null"))


@pytest.mark.parametrize("recorded", [True, False])
def test_the_label_space_is_the_one_that_the_run_was_begun_with(coco128: Path, tmp_path: Path, recorded: bool) -> None:
    """Published weights brought COCO's ids; their file is gone, and the run goes on in COCO's ids."""
    split = f"{{annotations: {coco128}/annotations/instances_train2017.json, images: {coco128}/train2017}}"
    settings = ("run.name=a", "data.root=null", f"data.train={split}", "data.max_images=8", "train.max_steps=1")
    model = prepare_job(tiny_config(coco128, tmp_path, *settings, "data.label_space=coco91", "run.name=x"), print)
    published = tmp_path / "published.pth"
    torch.save({"model": model.build_detector().model.state_dict()}, published)
    config = tiny_config(coco128, tmp_path, *settings, f"model.init_from={published}")
    fit_here(config)
    published.unlink()
    if not recorded:  # as earlier versions left it
        rewrite_record(tmp_path / "a", lambda record: record.pop("label_space"))
    for given in (config, tiny_config(coco128, tmp_path, *settings, "model.init_from=null")):
        assert prepare_job(given, print).data.label_map.num_classes == 91
