"""What a trial tells Ray Tune about its runs; the runs and the driver are stand-ins, and nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.hooks import Budget, Evaluated, JobHooks
from detr_ray.runtime.search import trial_actor
from detr_ray.runtime.search.control import Order
from detr_ray.runtime.search.trial_actor import Setup, Start, Training

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
        base: Any = None
        self.setup = Setup(base, space, "/runs/search", "val/AP", None, control, None, None, Budget(), last_round)
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
