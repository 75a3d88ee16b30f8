"""Trains the best configuration of a search and the unchanged one again (`--confirm`)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_dataset, tiny_config

from detr_ray.config import ConfigError, load_config
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import JobHooks
from detr_ray.engine.job import TrainJob
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.runtime.launch import Runs
from detr_ray.runtime.search import confirm
from detr_ray.runtime.search.directory import locked_search
from detr_ray.search import Trial
from detr_ray.search.confirmation import Confirmation


class HalfWay:
    """Runs that tell of half of their steps, and end.

    Attributes:
        metrics: of each evaluation.
    """

    metrics = {"val/AP": 0.5}

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> HalfWay:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, job: Any, hooks: JobHooks) -> SimpleNamespace:
        hooks.on_step(job.total_steps // 2)
        return SimpleNamespace(status="finished", metrics=self.metrics)


@pytest.fixture
def half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "Runs", HalfWay)
    monkeypatch.setattr(confirm, "prepare_job", lambda config, say: SimpleNamespace(total_steps=8))


def result_in(folder: str, **more: Any) -> Any:
    return SimpleNamespace(
        name="mine",
        best=Trial("t003"),
        best_values={"optim.lr": 1e-3},
        path=folder,
        tracking_uri=None,
        parent_run=None,
        on_confirmed=None,
        **more,
    )


@pytest.mark.usefixtures("half_way")
def test_it_tells_how_many_trainings_are_done(tmp_path: Path) -> None:
    done: list[float] = []
    config = load_config(None, ["data.root=/data"])
    confirm.confirm(config, result_in(str(tmp_path)), 2, lambda line: None, done.append)
    assert done == [0.5, 1.5, 2.5, 3.5]


@pytest.mark.usefixtures("half_way")
def test_an_evaluation_without_the_metric_is_named(tmp_path: Path) -> None:
    config = load_config(None, ["data.root=/data", "tune.metric=val/AP/cat"])
    with pytest.raises(RunFailed, match="confirm-t003-1042: its last evaluation gave no val/AP/cat"):
        confirm.confirm(config, result_in(str(tmp_path)), 2, lambda line: None)


@pytest.mark.usefixtures("half_way")
def test_nobody_else_writes_the_search_until_the_verdict_is_there(tmp_path: Path) -> None:
    config = load_config(None, ["data.root=/data"])
    with locked_search(str(tmp_path), "mine", print), pytest.raises(ConfigError, match=r"mine.* is being written by"):
        confirm.confirm(config, result_in(str(tmp_path)), 1, print)

    def is_locked(_: object) -> None:
        with pytest.raises(ConfigError, match="is being written by"), locked_search(str(tmp_path), "mine", print):
            pass
        told.append(True)

    told: list[bool] = []
    result = result_in(str(tmp_path))
    result.on_confirmed = is_locked
    confirm.confirm(config, result, 1, print, is_locked)
    assert told == [True] * 3, "in both trainings, and when the page is written"
    with locked_search(str(tmp_path), "mine", print):
        pass


def test_it_trains_both_with_a_new_seed_and_records_them_beside_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    config = tiny_config(data, tmp_path, "train.epochs=1", "tune.metric=val/AR100", "run.seed=7")
    (tmp_path / "search").mkdir()
    result = result_in(str(tmp_path / "search"))
    result.tracking_uri, result.parent_run = f"sqlite:///{tmp_path}/mlflow.db", "the search"
    jobs: list[tuple[TrainJob, JobHooks]] = []
    ends: list[FitResult] = []

    class Watched(Runs):
        def run(self, job: TrainJob, hooks: JobHooks, **more: bool) -> Any:
            jobs.append((job, hooks))
            ends.append(super().run(job, hooks, **more))
            return ends[-1]

    monkeypatch.setattr(confirm, "Runs", Watched)
    said: list[str] = []
    told: list[Confirmation] = []
    result.on_confirmed = told.append
    found = confirm.confirm(config, result, 1, said.append)
    assert told == [found], "for the page about the search"
    assert [(job.run.name, job.config.run.seed, job.config.optim.lr) for job, _ in jobs] == [
        ("confirm-t003-1007", 1007, 1e-3), ("confirm-default-1007", 1007, config.optim.lr),
    ]  # fmt: skip
    for job, hooks in jobs:
        assert (job.tracking_uri, hooks.parent_run) == (result.tracking_uri, "the search") and hooks.gets_report
        assert Path(job.run.path).parent == tmp_path / "search"
    assert not [line for line in said if "the same command" in line], "it would begin another search"
    assert found.smallest_p_value == 1.0
    values = [value for line in said if line.startswith("confirm-") for value in (float(line.split()[-1]),)]
    assert values == [pytest.approx(found.best[0], abs=1e-4), pytest.approx(found.default[0], abs=1e-4)]
    again = confirm.confirm(config, result, 1, said.append)
    assert again == found
    assert [end.status for end in ends] == ["finished"] * 2 + ["nothing to do"] * 2, "not trained again"
    # The search went on, and found a better trial.
    result.best, result.best_values = Trial("t005", generation=1), {"optim.lr": 2e-3}
    confirm.confirm(config, result, 1, said.append)
    assert [job.run.name for job, _ in jobs[4:]] == ["confirm-t005-g1-1007", "confirm-default-1007"]
    assert [end.status for end in ends[4:]] == ["finished", "nothing to do"]
