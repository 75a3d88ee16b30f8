"""Which trials are stopped early, as Ray Tune would ask; and that interruptions and second attempts change nothing."""

from __future__ import annotations

import dataclasses
import pickle
import random
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from search.spaces import searching

from detr_ray.config import TuneConfig
from detr_ray.runtime.search.schedulers import build_scheduler
from detr_ray.search import Trial

EPOCHS = 9


@dataclasses.dataclass(eq=False)
class TunesTrial:
    """A trial of Ray Tune's: each start has another id."""

    trial_id: str
    config: dict[str, str]


class Waiting:
    """Ray Tune's controller, with a trial that waits for its start."""

    def get_live_trials(self) -> list[Any]:
        class Pending:
            status = "PENDING"

        return [Pending()]


def settings(*overrides: str) -> TuneConfig:
    return searching({"optim.lr": {"uniform": [0, 1]}}, f"train.epochs={EPOCHS}", *overrides).tune


class Search:
    """Trials that train in turn, an epoch each, and are asked after by a scheduler; values come from the tests."""

    def __init__(self, tune: TuneConfig) -> None:
        self.tune = tune
        self.starts = 0
        self.trials: dict[str, Trial] = {}
        self.tunes: dict[str, TunesTrial] = {}
        self.scheduler = build_scheduler(tune, EPOCHS, [])

    @property
    def running(self) -> list[str]:
        return [name for name, trial in self.trials.items() if trial.state == "running"]

    def begin(self) -> str:
        """A new trial's name."""
        name = f"t{len(self.trials):03d}"
        self.trials[name] = Trial(name, state="running")
        self.start(name)
        return name

    def start(self, name: str) -> None:
        """A start of a trial, also again."""
        self.starts += 1
        self.tunes[name] = TunesTrial(f"id {self.starts}", {"trial": name})
        self.scheduler.on_trial_add(Waiting(), self.tunes[name])

    def epoch(self, name: str, value: float) -> str:
        """The next epoch; what the scheduler says to it."""
        return self.result(name, int(self.trials[name].epoch) + 1, value)

    def result(self, name: str, epoch: int, value: float) -> str:
        trial, result = self.tunes[name], {"epoch": epoch, "value": value, "time_total_s": 1.0}
        decision = "STOP" if epoch == EPOCHS else self.scheduler.on_trial_result(Waiting(), trial, result)
        self.trials[name] = self.trials[name].measured(epoch, epoch * 4, value, self.tune.mode)
        if decision == "STOP":
            self.scheduler.on_trial_complete(Waiting(), trial, result)
            state = "finished" if epoch == EPOCHS else "stopped early"
            self.trials[name] = dataclasses.replace(self.trials[name], state=state)
        return decision

    def resume(self) -> None:
        """Goes on in another process."""
        self.scheduler = build_scheduler(self.tune, EPOCHS, [one for one in self.trials.values() if one.history])
        for name in self.running:
            self.start(name)


def value_of(name: str, epoch: int) -> float:
    return round(random.Random(name).random() + random.Random(f"{name} {epoch}").random() / 3, 3)


def run(tune: TuneConfig, *, disturb: str = "") -> list[tuple[str, str, float]]:
    """A search of nine trials, three at once, in a random order; how each ended."""
    search, chance = Search(tune), random.Random(1)
    disturbed = 0
    while len(search.trials) < 9 or search.running:
        while len(search.trials) < 9 and len(search.running) < 3:
            search.begin()
        name = chance.choice(search.running)
        epoch = int(search.trials[name].epoch)
        if disturb == "resume" and epoch % 2:
            search.resume()
            disturbed += 1
        if disturb == "again" and epoch in (3, 4):
            search.start(name)  # it failed, and begins at a checkpoint before its last evaluation
            search.result(name, epoch, value_of(name, epoch))
            disturbed += 1
        search.epoch(name, value_of(name, epoch + 1))
    assert disturbed > 3 or not disturb
    return [(trial.name, trial.state, trial.epoch) for trial in search.trials.values()]


@pytest.mark.parametrize("kind", ["asha", "median"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_interruptions_and_second_attempts_change_no_decision(kind: str, mode: str) -> None:
    tune = settings(f"tune.scheduler={kind}", f"tune.mode={mode}", "tune.grace_epochs=2", "tune.reduction_factor=2")
    undisturbed = run(tune)
    assert len({state for _, state, _ in undisturbed}) == 2, "some end early, and some do not"
    assert run(tune, disturb="resume") == undisturbed
    assert run(tune, disturb="again") == undisturbed


def test_asha_keeps_the_best_share_at_each_stage() -> None:
    """Stages after 1 and 3 epochs: the best third of those that came so far."""
    search = Search(settings("tune.scheduler=asha", "tune.reduction_factor=3"))
    decisions = {}
    for number, value in enumerate((0.5, 0.4, 0.6, 0.1)):
        name = search.begin()
        decisions[number] = search.epoch(name, value)
    assert decisions == {0: "CONTINUE", 1: "STOP", 2: "CONTINUE", 3: "STOP"}
    for value in (0.0, 0.5):  # the second epoch ends no stage
        assert search.epoch("t000", value) == "CONTINUE"
    assert search.epoch("t002", 0.0) == "CONTINUE" and search.epoch("t002", 0.4) == "STOP"


def test_reduction_factor_and_grace_epochs_say_when_and_how_many() -> None:
    def stopped(*overrides: str) -> list[float]:
        search = Search(settings("tune.scheduler=asha", *overrides))
        ends = []
        for value in (0.6, 0.5, 0.55, 0.4):
            name = search.begin()
            while search.epoch(name, value) == "CONTINUE":
                pass
            ends.append(search.trials[name].epoch)
        return ends

    assert stopped("tune.reduction_factor=3") == [9, 1, 1, 1]
    assert stopped("tune.reduction_factor=3", "tune.grace_epochs=4") == [9, 4, 4, 4]
    assert stopped("tune.reduction_factor=2") == [9, 1, 2, 1]


def test_median_stops_what_is_worse_than_half_of_the_others() -> None:
    """Compared with at least three, from the grace period on; and nobody is paused, whoever waits."""
    search = Search(settings("tune.scheduler=median", "tune.grace_epochs=2"))
    for value in (0.3, 0.5, 0.4):
        name = search.begin()
        assert [search.epoch(name, value) for _ in range(3)] == ["CONTINUE"] * 3
    search.begin()
    assert [search.epoch("t003", 0.35) for _ in range(2)] == ["CONTINUE", "STOP"]
    search.begin()
    assert [search.epoch("t004", 0.45) for _ in range(3)] == ["CONTINUE"] * 3


def test_a_resumed_search_decides_about_new_evaluations_alone() -> None:
    """Its bad start was seen by nobody when it was evaluated; the others came later."""
    search = Search(settings("tune.scheduler=median"))
    slow = search.begin()
    assert [search.epoch(slow, value) for value in (0.1, 0.2)] == ["CONTINUE"] * 2
    others = [search.begin() for _ in range(3)]
    for name in others:
        assert [search.epoch(name, 0.5) for _ in range(3)] == ["CONTINUE"] * 3
    search.trials = {name: search.trials[name] for name in (*others, slow)}  # as if it had been created last
    search.resume()
    assert [search.epoch(slow, 0.9), search.epoch(others[0], 0.4)] == ["CONTINUE"] * 2
    search.begin()
    assert search.epoch("t004", 0.1) == "STOP", "those of the earlier process are compared with"


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_trial_that_fails_before_its_first_evaluation_disturbs_nothing(kind: str) -> None:
    search = Search(settings(f"tune.scheduler={kind}"))
    search.begin()
    failed = {"generation": 0, "done": True, "problem": "the loss is NaN", "again": False, "stopped": False}
    search.scheduler.on_trial_complete(Waiting(), search.tunes["t000"], failed)
    for value in (0.5, 0.6, 0.7, 0.8):
        name = search.begin()
        for _ in range(4):
            search.epoch(name, value)


@pytest.mark.parametrize("kind", ["none", "pbt"])
def test_others_stop_nobody(kind: str) -> None:
    scheduler = build_scheduler(settings(f"tune.scheduler={kind}"), EPOCHS, [Trial("t000").measured(1, 4, 0.5, "max")])
    assert type(scheduler) is FIFOScheduler
    assert scheduler.on_trial_result(None, None, {"epoch": 5, "value": -9.0}) == TrialScheduler.CONTINUE


def test_ray_tune_can_write_it_down() -> None:
    search = Search(settings("tune.scheduler=asha"))
    search.begin()
    pickle.loads(pickle.dumps(search.scheduler))
