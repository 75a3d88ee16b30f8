"""Whole searches by the command: a population and its replay, failures, a killed driver, an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest
import torch
import yaml
from tiny import TINY, make_dataset

from detr_ray.config import load_config
from detr_ray.engine.hooks import Budget, JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.runtime.launch import run_job
from detr_ray.runtime.search.results import measured_best
from detr_ray.search.lived_schedule import lived_values, schedule_file
from detr_ray.search.population import Population
from detr_ray.search.trials import Trial, best_trial, read_trials
from detr_ray.tracking import tracking_uri
from detr_ray.tracking.registry import ModelRegistry

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(590)]

STEPS_AN_EPOCH = 5

# 100 boxes an image hit something by chance: recall differs between trials from the first epoch on.
BASE = (
    *TINY,
    "model.num_queries=100",
    "tune.metric=val/AR100",
    "train.num_workers=1",
    "optim.schedule=constant",
    "tracking.enabled=true",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_val=16)


class Search:
    """A search by the command, in a process of its own.

    Args:
        dataset: folder of the data.
        storage: folder of all runs.
        settings: further ``key=value`` arguments.
    """

    def __init__(self, dataset: Path, storage: Path, *settings: str) -> None:
        self.storage = storage
        self.folder = storage / "search"
        self.arguments = [*BASE, f"data.root={dataset}", f"run.storage={storage}", "tune.name=search", *settings]

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Starts the command."""
        command = [sys.executable, "-m", "detr_ray.tune", *self.arguments, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        """Runs the command to its end."""
        process = self.start(*options)
        try:
            text, _ = process.communicate(timeout=500)
        finally:
            process.kill()
        return process.returncode, text

    def trials(self) -> list[Trial]:
        """The trials as they are kept."""
        return read_trials(str(self.folder)) if self.folder.exists() else []


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    last = max((run / "checkpoints").glob("step_*"))
    return torch.load(last / "model.pt", weights_only=True)["model"]


def recorded(storage: Path, experiment: str, names: list[str], run_name: str) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of an MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(None, storage))
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id], f"attributes.run_name = '{run_name}'")
    return {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)} for name in names
    }


def children(storage: Path) -> dict[str, Any]:
    """Name -> MLflow run of the trials of the search."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(None, storage))
    experiment = client.get_experiment_by_name("detr_ray")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs if run is not parent)
    return {run.info.run_name: run for run in runs}


def artifact(storage: Path, run_name: str, name: str) -> bytes:
    """A file that is recorded with an MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(None, storage))
    return Path(client.download_artifacts(children(storage)[run_name].info.run_id, name)).read_bytes()


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_population_moves_trials_and_what_one_lived_through_can_be_replayed(
    launcher: str, dataset: Path, tmp_path: Path
) -> None:
    epochs = 4
    search = Search(
        dataset,
        tmp_path,
        "tune.space={optim.lr: {loguniform: [1e-6, 1e-2]}, loss.giou: {uniform: [1, 4]}, loss.ce: {uniform: [1, 4]}}",
        "tune.scheduler=pbt",
        "tune.trials=3",
        f"train.launcher={launcher}",
        f"train.epochs={epochs}",
        "tracking.register=true",
    )
    code, text = search.run()
    assert code == 0, text
    state = json.loads((search.folder / "population.json").read_text())
    population = Population(
        3, lambda values, chance: values, every_epochs=1, epochs=epochs, quantile=0.25, mode="max", seed=0
    )
    population.restore(state)
    best = best_trial(search.trials(), "max")
    assert best is not None
    best = measured_best(best, population)
    (version,) = ModelRegistry(tracking_uri(None, tmp_path), "detr").versions()
    assert version.tags["run.path"] == str(search.folder / best.run_name) and version.is_champion, text
    tagged = [name for name, run in children(tmp_path).items() if run.data.tags.get("search.best") == "true"]
    assert tagged == [best.run_name] and f"best              {best.run_name}: " in text
    for name in ("parallel_coordinates.png", "history.png"):
        assert (search.folder / name).read_bytes() == artifact(tmp_path, "search", name)
        assert matplotlib.image.imread(search.folder / name).std() > 0, "something is drawn"
    assert state["decided_epoch"] == epochs - 1 and state["moves"], text
    move = state["moves"][-1]
    trial = next(one for one in search.trials() if one.name == move["receiver"])
    assert trial.generation == move["generation"] and trial.values == move["new"] != move["old"]
    assert [step for _, step, _ in trial.history] == [STEPS_AN_EPOCH * (epoch + 1) for epoch in range(epochs)]

    # Its weights are those of its ancestors: one training with their values, one after another, ends with equal bits.
    lived = population.ancestry(trial.name)
    assert len(lived) > 1
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(schedule_file(lived_values(lived, STEPS_AN_EPOCH)))
    overrides = [item for item in search.arguments if not item.startswith("tune.")]
    replay = load_config([schedule], [*overrides, f"train.epochs={epochs}", "run.name=replay"])
    result = run_job(prepare_job(replay, print), JobHooks(budget=Budget(threads=1)))
    assert result.status == "finished"
    own, again = weights_of(search.folder / f"{trial.name}-g{trial.generation}"), weights_of(tmp_path / "replay")
    assert own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)

    # Each part of the chain has recorded the values that the replay records at the same steps.
    names = ["optim/lr", "loss/weight/giou", "loss/weight/ce", "train/loss"]
    replayed = recorded(tmp_path, "detr_ray", names, "replay")
    part = recorded(tmp_path, "detr_ray", names, f"{trial.name}-g{trial.generation}")
    for name in names:
        assert part[name] and all(replayed[name][step] == value for step, value in part[name].items())
    assert set(part["optim/lr"]) == set(range(move["step"] + 1, epochs * STEPS_AN_EPOCH + 1))

    written = yaml.safe_load((search.folder / "schedule.yaml").read_text())
    assert written.keys() == {"optim", "loss"} and written["loss"].keys() == {"giou", "ce"}
    assert not list(search.folder.rglob("held")), "nothing is held any more"
    assert move["receiver"] in (search.folder / "exploits.txt").read_text()


def test_a_search_goes_on_after_its_driver_was_killed_and_failures_do_not_end_it(dataset: Path, tmp_path: Path) -> None:
    epochs = 6
    search = Search(
        dataset,
        tmp_path,
        "tune.space={optim.lr: {grid: [1.0e-4, 1.0e+30]}, optim.clip_max_norm: {grid: [0, 0.1]}}",
        "tune.constraints=['optim.lr < 1 or optim.clip_max_norm == 0']",
        "tune.searcher=grid",
        "tune.max_concurrent=1",
        f"train.epochs={epochs}",
        "train.keep_last=99",
    )
    process = search.start()
    try:
        wait_for(lambda: [trial.state for trial in search.trials()][:1] == ["finished"], process)
        wait_for(lambda: len(search.trials()) > 1 and len(search.trials()[1].history) >= 2, process)
    finally:
        process.kill()  # Ray's own processes end by themselves when it is gone
        process.communicate()
    before = search.trials()
    assert (before[0].state, before[1].state) == ("finished", "running")
    kept = {path: path.stat().st_mtime_ns for path in (search.folder / "t000").rglob("*.pt")}
    early = search.folder / "t001" / "checkpoints" / f"step_{STEPS_AN_EPOCH:08d}" / "model.pt"
    written = early.stat().st_mtime_ns

    code, text = search.run("--resume")
    assert code == 0, text
    assert "1 trials are over and not run again; t001 go on" in text
    after = {trial.name: trial for trial in search.trials()}
    assert {name: trial.state for name, trial in after.items()} == {
        "t000": "finished", "t001": "finished", "t002": "failed", "t003": "refused",
    }, text  # fmt: skip
    assert after["t000"] == before[0]
    assert {path: path.stat().st_mtime_ns for path in (search.folder / "t000").rglob("*.pt")} == kept
    assert after["t001"].attempts == 2 and after["t001"].values == before[1].values
    assert early.stat().st_mtime_ns == written, "it went on from a later checkpoint"
    assert [step for _, step, _ in after["t001"].history] == [STEPS_AN_EPOCH * (1 + epoch) for epoch in range(epochs)]
    failed, refused = after["t002"], after["t003"]
    assert "not finite" in failed.problem and failed.attempts == 1, "what all workers agree on would fail again"
    assert "tune.constraints" in refused.problem and refused.attempts == 0 and not (search.folder / "t003").exists()

    runs = children(tmp_path)
    assert {name: run.info.status for name, run in runs.items()} == {
        "search": "FINISHED", "t000": "FINISHED", "t001": "FINISHED", "t002": "FAILED", "t003": "FAILED",
    }  # fmt: skip
    assert "not finite" in runs["t002"].data.tags["trial.problem"]
    best = [name for name, run in runs.items() if run.data.tags.get("search.best") == "true"]
    assert len(best) == 1 and best[0] in ("t000", "t001")
    assert f"best              {best[0]}" in text and "python -m detr_ray.train" in text


def test_an_interrupted_search_stops_in_seconds_and_says_how_to_go_on(dataset: Path, tmp_path: Path) -> None:
    search = Search(
        dataset,
        tmp_path,
        "tune.space={optim.lr: {loguniform: [1.0e-5, 1.0e-3]}}",
        "tune.trials=2",
        "tune.max_concurrent=1",
        "train.epochs=500",
    )
    process = search.start()
    try:
        wait_for(lambda: bool(search.trials()) and len(search.trials()[0].history) >= 1, process)
        began = time.monotonic()
        own = psutil.Process(process.pid).children(recursive=True)
        assert len(own) > 3, "Ray's processes and the trial's"
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert time.monotonic() - began < 60
    _, left = psutil.wait_procs(own, timeout=30)
    assert left == [], "nothing is left running"
    assert "--resume tune.name=search" in text and "best              t000" in text
    assert search.trials()[0].state == "stopped"
    assert children(tmp_path)["t000"].info.status == "KILLED"


def test_a_search_of_which_nothing_came_has_failed(dataset: Path, tmp_path: Path) -> None:
    space = "tune.space={optim.lr: {grid: [1.0e+30]}, optim.clip_max_norm: {grid: [0]}}"
    search = Search(dataset, tmp_path, space, "tune.searcher=grid", "train.launcher=ray")
    code, text = search.run()
    assert code == 1 and "no trial gave a value of val/AR100" in text, text
    assert search.trials()[0].attempts == 1, "what all workers agree on would fail again"
    assert {name: run.info.status for name, run in children(tmp_path).items()} == {"search": "FAILED", "t000": "FAILED"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 150) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, "it takes too long"
        time.sleep(0.1)
