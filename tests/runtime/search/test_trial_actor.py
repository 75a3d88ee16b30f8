"""What a trial tells Ray Tune about its runs, with a stand-in for the driver, and mostly for the runs, too."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_dataset, tiny_config

from detr_ray.config import ConfigError, load_config
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, Evaluated, JobHooks
from detr_ray.engine.opened_data import open_data
from detr_ray.engine.reporting.tracking_store import recorded_in
from detr_ray.runtime.launch import Runs
from detr_ray.runtime.search import trial_actor
from detr_ray.runtime.search.control import Order
from detr_ray.runtime.search.trial_actor import Setup, Start, Training, TrialActor
from detr_ray.search import SearchSpace

STEPS_AN_EPOCH, EPOCHS = 5, 3


class Driver:
    """The driver, as a trial sees it.

    Attributes:
        stopping: whether trials are to stop.
        decided_epoch: of the last decided round.
        order: the trial's order.
    """

    def __init__(self) -> None:
        self.stopping, self.decided_epoch, self.share = False, 0, 0.0
        self.order: Order | None = None

    def say(self, line: str) -> None: ...

    def moved(self, generation: int, seconds: float) -> None: ...

    def end(self) -> None: ...


class OneRun:
    """Runs that evaluate some epochs, and end.

    Attributes:
        evaluated: epochs that have scores.
        status: how a run ends.
        jobs: the prepared jobs.
    """

    def __init__(self) -> None:
        self.evaluated = [1, 2, 3]
        self.status = "finished"
        self.jobs: list[Any] = []

    def run(self, job: Any, hooks: JobHooks) -> SimpleNamespace:
        assert not hooks.gets_report, "only the search has a report"
        self.jobs.append(job)
        for epoch in self.evaluated:
            hooks.on_evaluation(Evaluated(epoch * STEPS_AN_EPOCH, {"val/AP": epoch / 8}, f"/c/step_{epoch:08d}"))
        return SimpleNamespace(status=self.status)


class Place:
    """A trial of a population with rounds after epochs 1 and 2, with its stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last_round: int = 2) -> None:
        self.driver, self.runs = Driver(), OneRun()
        self.earlier: list[CheckpointInfo] = []
        monkeypatch.setattr(trial_actor, "Line", lambda control, trial: self.driver)
        monkeypatch.setattr(trial_actor, "LOOK_S", 0.001)
        monkeypatch.setattr(trial_actor, "prepare_job", lambda config, say, opened: self._job(config))
        control: Any = None
        space: Any = SimpleNamespace(trial_config=lambda base, values, run: (run["name"], dict(values)))
        monkeypatch.setattr(trial_actor, "recorded_in", lambda config, uri: config)
        base: Any = None
        store = "sqlite:////runs/mlflow.db"
        self.setup = Setup(
            base, space, "/runs/search", "val/AP", None, control, None, store, None, Budget(), last_round
        )
        self.log: Any = SimpleNamespace(trial="", warn=None)

    def _job(self, config: Any) -> SimpleNamespace:
        store = SimpleNamespace(checkpoints=lambda: self.earlier)
        return SimpleNamespace(
            config=config, run=SimpleNamespace(checkpoints=store), total_steps=EPOCHS * STEPS_AN_EPOCH,
            steps_per_epoch=STEPS_AN_EPOCH,
        )  # fmt: skip

    def begin(self, **changes: Any) -> Iterator[dict[str, Any]]:
        """The trial's results, up to the last one."""
        runs: Any = self.runs
        training = Training(self.setup, dataclasses.replace(Start("t000", {"lr": 1.0}), **changes), runs, self.log)
        while True:
            result = training.next_result()
            yield result
            if result["done"]:
                return


def test_a_trial_waits_at_its_end_for_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    results = place.begin()
    assert [next(results)["epoch"] for _ in range(2)] == [1, 2]
    assert next(results) == {"generation": 0, "done": False, "waits": True}, "it reports that no evaluation follows"
    place.driver.decided_epoch = 2
    (last,) = results
    assert (last["epoch"], last["value"], last["problem"], last["stopped"]) == (3, 0.375, "", False)


def test_a_trial_that_only_waits_is_stopped_and_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be moved by a round when the search is resumed."""
    place = Place(monkeypatch)
    results = place.begin()
    while "waits" not in next(results):
        pass
    place.driver.stopping = True
    (last,) = results
    assert last["stopped"] and last["epoch"] == 3


def test_a_trial_without_a_population_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = list(Place(monkeypatch, last_round=0).begin())
    assert [result.get("epoch") for result in results] == [1, 2, 3] and not results[-1]["stopped"]


def test_a_moved_trial_begins_its_next_run_at_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    results = place.begin()
    while "waits" not in next(results):
        pass
    place.runs.evaluated = []
    place.driver.order = Order(1, {"lr": 2.0}, "/runs/search/t001/checkpoints/step_00000010")
    place.driver.decided_epoch = 2
    (last,) = results
    assert [job.config for job in place.runs.jobs] == [("t000", {"lr": 1.0}), ("t000-g1", {"lr": 2.0})]
    assert last["generation"] == 1 and "value" not in last, "an evaluation of the run before is none of this one"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "problem", "again"),
    [
        (ConfigError("train.global_batch_size: 9 is more than 8 images"), "train.global_batch_size: 9 is more", False),
        (RunFailed("the loss is not finite", agreed=True), "the loss is not finite", False),
        (RunFailed("a worker was lost"), "a worker was lost", True),
        (OSError("no space"), "OSError: no space", True),
        (caused(ConfigError("run.storage: cannot be listed"), OSError("slow down")), "run.storage: cannot be", True),
    ],
)
def test_what_would_come_again_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str, again: bool
) -> None:
    def refuse(config: Any, say: Any, opened: Any) -> None:
        raise error

    place = Place(monkeypatch)
    monkeypatch.setattr(trial_actor, "prepare_job", refuse)
    (last,) = place.begin()
    assert last["problem"].startswith(problem) and last["again"] is again


def test_what_the_workers_of_a_run_refuse_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)

    def refuse(job: Any, hooks: JobHooks) -> None:
        raise ConfigError("'t000' in /runs/search is being written by process 7")

    monkeypatch.setattr(place.runs, "run", refuse)
    (last,) = place.begin()
    assert last["problem"].startswith("'t000' in /runs/search is being written") and last["again"] is True


def test_evaluations_of_an_earlier_process_are_told_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Place(monkeypatch, last_round=0)
    place.runs.evaluated = []
    place.earlier = [
        CheckpointInfo(epoch * STEPS_AN_EPOCH, str(tmp_path), metrics, {}, {})
        for epoch, metrics in ((1, {"val/AP": 0.1}), (2, {"val/AP": 0.2}), (3, None))
    ]
    results = list(place.begin(known_step=5))
    assert [(result["epoch"], result["value"]) for result in results] == [(2, 0.2), (2, 0.2)]
    assert [result["done"] for result in results] == [False, True]


class Log:
    """Takes the lines of a trial."""

    def __init__(self) -> None:
        self.trial, self.warn, self.lines = "", print, list[str]()

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def weights_at_end(run: Path) -> dict[str, torch.Tensor]:
    latest = CheckpointStore(f"{run}/checkpoints").latest()
    assert latest is not None and latest.step == 4
    return CheckpointStore(f"{run}/checkpoints").load(latest, "model.pt")["model"]


def test_trials_of_one_configuration_are_equal_and_a_moved_one_continues_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To the bit, after real trainings: so a move clones weights, moments and the place in the stream."""
    data = make_dataset(tmp_path / "data", num_train=16, num_val=2)
    base = tiny_config(data, tmp_path, "tune.space={optim.lr: {loguniform: [1e-4, 1e-2]}}", "tune.scheduler=pbt")
    driver = Driver()
    driver.decided_epoch = 1
    monkeypatch.setattr(trial_actor, "Line", lambda control, trial: driver)
    control: Any = None
    folder = tmp_path / "search"
    setup = Setup(
        base, SearchSpace.from_config(base), str(folder), "val/AP", open_data(base.data, print), control, None,
        f"sqlite:///{tmp_path}/mlflow.db", None, Budget(), last_round=1,
    )  # fmt: skip

    def train(name: str, rate: float) -> list[dict[str, Any]]:
        log: Any = Log()
        training = Training(setup, Start(name, {"optim.lr": rate}), Runs(Budget(), log), log)
        results = [training.next_result()]
        while not results[-1]["done"]:
            results.append(training.next_result())
        assert results[-1]["problem"] == ""
        return results

    first, _ = train("t000", 1e-3)
    train("t001", 1e-3)
    driver.order = Order(1, {"optim.lr": 1e-3}, first["checkpoint"])
    moved = train("t002", 5e-3)
    assert [(result["generation"], result["step"]) for result in moved] == [(1, 4)]
    donor, alike, receiver = (weights_at_end(folder / name) for name in ("t000", "t001", "t002-g1"))
    for other in (alike, receiver):
        assert all(torch.equal(weight, other[name]) for name, weight in donor.items())
    begin = torch.load(Path(first["checkpoint"], "model.pt"), weights_only=True)["model"]
    assert any(not torch.equal(weight, donor[name]) for name, weight in begin.items()), "it was trained in between"


def test_a_trial_has_the_store_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of another machine may name another MLflow store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNE_ORIG_WORKING_DIR", str(tmp_path))
    setup = Place(monkeypatch).setup
    for on_driver in ("http://tracking:5000", None):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
        actor = TrialActor.__new__(TrialActor)
        actor.setup(Start("t000", {}).to_config(), dataclasses.replace(setup, environment_uri=on_driver))
        assert os.environ.get("MLFLOW_TRACKING_URI") == on_driver


class LongStep(OneRun):
    """A run that looks only after its step whether it is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping, self.given_up = threading.Event(), threading.Event()

    def run(self, job: Any, hooks: JobHooks) -> SimpleNamespace:
        assert self.stepping.wait(20) and hooks.should_abandon()
        self.given_up.set()
        return SimpleNamespace(status="stopped")


def test_workers_are_handed_on_after_their_run_was_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNE_ORIG_WORKING_DIR", str(tmp_path))
    monkeypatch.setattr(trial_actor, "ENDED_WITHIN_S", 0.01)
    place = Place(monkeypatch, last_round=0)
    base: Any = SimpleNamespace(train=SimpleNamespace(stall_timeout_s=0.2))
    actor = TrialActor.__new__(TrialActor)
    actor.setup(Start("t000", {}).to_config(), dataclasses.replace(place.setup, base=base))
    actor._runs = place.runs = runs = LongStep()
    actor._training = Training(actor._setup, actor._start, actor._runs, place.log)
    with pytest.raises(RuntimeError, match=r"t000, whose workers it was to get, has not given up its run for 0\.21 s"):
        actor.reset_config(Start("t001", {}).to_config())
    runs.stepping.set()
    assert runs.given_up.wait(20), "it ends all the same, after its step"
    actor._training = Training(actor._setup, actor._start, actor._runs, place.log)
    assert actor.reset_config(Start("t001", {}).to_config()) and actor._start.trial == "t001"


@pytest.mark.parametrize(
    ("named", "environment", "expected"),
    [
        (None, "", "sqlite:////s.db"),
        ("sqlite:////own.db", "", "sqlite:////own.db"),
        (None, "http://tracking:5000", None),
    ],
)
def test_a_trial_records_where_the_search_does(
    monkeypatch: pytest.MonkeyPatch, named: str | None, environment: str, expected: str | None
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    config = load_config(None, [] if named is None else [f"tracking.uri={named}"])
    assert recorded_in(config, "sqlite:////s.db").tracking.uri == expected
