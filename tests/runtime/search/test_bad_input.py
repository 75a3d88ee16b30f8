"""What the tune command refuses before anything starts: one line that names the key, and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from tiny import TINY, make_dataset

from detr_ray.config import Config, load_config
from detr_ray.runtime.search import search
from detr_ray.runtime.search.directory import open_search
from detr_ray.tune import main

Run = Callable[..., str]

RATE = "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=2)


@pytest.fixture
def refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with arguments that it refuses; gives what it said."""

    def run(*arguments: str) -> str:
        argv = [*TINY, f"data.root={dataset}", f"run.storage={tmp_path}", *arguments]
        assert main(argv) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        return lines[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune.space={optim.lrr: {uniform: [0, 1]}}"], ["tune.space: ", "optim.lrr", "did you mean 'optim.lr'"]),
        (["tune.space={optim.lr: {uniform: [1, 1]}}"], ["tune.space: optim.lr", "empty"]),
        (["tune.space={optim.lr: {loguniform: [1e-2, 1e-4]}}"], ["tune.space: optim.lr", "reversed"]),
        ([RATE, "tune.metric=val/loss"], ["tune.metric: val/loss is never reported"]),
        ([RATE, "tune.metric=val/AP/unicorn"], ["tune.metric: val/AP/unicorn", "no category 'unicorn'", "it has "]),
        ([RATE, "tune.scheduler=asha", "tune.grace_epochs=3"], ["tune.grace_epochs: ", "train.epochs (2)", "got 3"]),
        (
            ["tune.space={model.num_queries: {randint: [8, 16]}}", "tune.scheduler=pbt"],
            ["tune.space: model.num_queries cannot change while a trial trains", "optim.lr"],
        ),
        (
            [RATE, "tune.scheduler=pbt", "train.epochs=4", "train.max_steps=9"],
            ["train.max_steps: must be null with tune.scheduler=pbt"],
        ),
        ([], ["tune.space: is empty"]),
        ([RATE, "--resume"], ["tune.name: --resume needs the name"]),
        ([RATE, "--resume", "tune.name=nowhere"], ["tune.name: there is no search 'nowhere'"]),
        ([RATE, "--confirm", "1"], ["--confirm: must be 2 or more seeds, not 1"]),
        ([RATE, "--confirm", "-3"], ["--confirm: must be 2 or more seeds, not -3"]),
        ([RATE, "--confirm", "12"], ["--confirm: must be at most 11 seeds, not 12"]),
    ],
)
def test_bad_input_is_refused_in_one_line(refused: Run, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    line = refused(*arguments)
    assert line.startswith(said[0]) and all(part in line for part in said), line
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_a_cluster_that_does_not_answer_leaves_no_search(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "no cluster answers at 127.0.0.1:1" in refused(RATE, "tune.name=mine")
    assert list(tmp_path.iterdir()) == []


def test_storage_that_a_trial_cannot_use_is_refused_by_the_search(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a job of ``ray job submit --working-dir .`` whose ``run.storage`` is the default."""
    monkeypatch.setattr(search, "search_session", lambda config: contextlib.nullcontext())
    storage = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    line = refused(RATE, "tune.name=mine", f"run.storage={storage}")
    assert line.startswith(f"run.storage: {storage}/mine is in the copy of the working folder") and "s3://" in line
    assert list(tmp_path.iterdir()) == []


def test_an_existing_search_is_not_begun_again(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "search.json").write_text('{"search_id": "a", "config": {}, "fingerprints": {}}')
    line = refused(RATE, "tune.name=mine")
    assert line.startswith("tune.name: a search 'mine' exists") and "--resume" in line


def test_a_search_that_another_process_writes_is_refused_before_ray_starts(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read of its trials would be old once Ray has started."""

    def no_ray(config: Config) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(search, "search_session", no_ray)
    monkeypatch.setattr(search, "_fingerprints", lambda opened: {"train": "x"})
    argv = [*TINY, f"data.root={dataset}", f"run.storage={tmp_path}", RATE, "tune.name=mine"]
    begun = open_search(load_config(None, argv), {"train": "x"}, resume=False)
    with begun.locked(print):
        assert main([*argv, "--resume"]) == 2
    assert "is being written by process" in capsys.readouterr().err
