"""Where a search's trials come from, with a real book and a real space; whether there is room is said by the tests."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from search.spaces import searching

from detr_ray.config import Config
from detr_ray.runtime.search.sources import MOST_REFUSED, Listed, OptunaTpe, Proposer, Source
from detr_ray.runtime.search.trial_actor import Start
from detr_ray.search import SearchSpace, Trial
from detr_ray.search.book import Book

RATE = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}


class Place:
    """A source, and what it is told.

    Attributes:
        room: number of trials that have room.
        ending: whether the search ends.
        said: lines for the user.
        exhausted: how often it said that no more trials come.
        left: how many trials it said are left.
    """

    def __init__(self, folder: Path, config: Config, proposer: Proposer | None = None, trials: Sequence[Trial] = ()):
        self.space = SearchSpace.from_config(config)
        self.room, self.ending = 100, False
        self.said: list[str] = []
        self.exhausted, self.left = 0, list[int]()
        self.book = Book(str(folder), config.tune.mode, config.tune.max_trial_failures, trials)
        self.source = Source(
            self.book, proposer or Listed(self.space, config.tune), config.tune.trials,
            lambda values: self.space.refusal(config, values),
            lambda running: running < self.room, lambda: self.ending,
            lambda trial: Start(trial.name, trial.values, known_step=trial.step), self.said.append, self._end,
            self.left.append,
        )  # fmt: skip

    def _end(self) -> None:
        self.exhausted += 1

    def next(self) -> str | None:
        """Name of the trial that starts, None, or FINISHED."""
        given = self.source.suggest("an id of Tune's")
        return Start.of_config(given).trial if isinstance(given, dict) else given


def test_as_many_run_as_have_room(tmp_path: Path) -> None:
    place = Place(tmp_path, searching(RATE, "tune.trials=4"))
    place.room = 2
    assert [place.next() for _ in range(4)] == ["t000", "t001", None, None]
    assert [trial.state for trial in place.book.trials] == ["running"] * 2, "nothing is drawn before there is room"
    place.book.end("t000", "finished")
    assert [place.next() for _ in range(2)] == ["t002", None]
    place.room = 0
    for name in ("t001", "t002"):
        place.book.end(name, "stopped early")
    assert place.next() == "t003", "one always runs: it waits for its room itself"
    assert place.next() is None
    place.room = 9
    assert place.next() is None and place.exhausted == 1, "all four were begun"
    place.book.end("t003", "failed")
    assert place.next() == "FINISHED"
    assert place.left == [4, 4, 4, 4, 3, 3, 1, 1, 1, 0]


def test_no_more_trials_begin_once_it_is_said(tmp_path: Path) -> None:
    place = Place(tmp_path, searching(RATE, "tune.trials=4"))
    place.next()
    for _ in range(2):
        place.source.no_more()
    assert place.next() is None and place.exhausted == 1 and place.left[-1] == 1
    place.book.end("t000", "finished")
    assert place.next() == "FINISHED"


def test_trials_are_those_of_the_space_and_of_the_seed(tmp_path: Path) -> None:
    def values(folder: str, *overrides: str) -> list[Mapping[str, Any]]:
        place = Place(tmp_path / folder, searching(RATE, "tune.trials=3", *overrides))
        while place.next() is not None:
            pass
        return [trial.values for trial in place.book.trials]

    first = values("a")
    assert first == values("b") != values("c", "tune.seed=1") and len(first) == 3
    assert all(1e-5 <= value["optim.lr"] <= 1e-3 for value in first)


def test_a_failed_trial_is_started_again_before_new_ones(tmp_path: Path) -> None:
    place = Place(tmp_path, searching(RATE, "tune.trials=3", "tune.max_trial_failures=1"))
    assert [place.next() for _ in range(2)] == ["t000", "t001"]
    place.book.fail("t000", "a fault", again=True)
    assert [place.next() for _ in range(3)] == ["t000", "t002", None]
    place.book.fail("t000", "a fault", again=True)
    assert place.next() is None and place.book["t000"].state == "failed"


def test_nothing_begins_where_the_search_ends(tmp_path: Path) -> None:
    place = Place(tmp_path, searching(RATE))
    place.next()
    place.ending = True
    assert place.next() == "FINISHED" and len(place.book.trials) == 1


def test_refused_draws_are_reported_and_cost_no_trial(tmp_path: Path) -> None:
    config = searching(RATE, "tune.trials=3", "tune.constraints=['optim.lr < 5e-5']")
    place = Place(tmp_path, config)
    begun = []
    while (name := place.next()) is not None:
        begun.append(name)
    refused = [trial for trial in place.book.trials if trial.state == "refused"]
    assert len(begun) == 3 and refused
    assert begun == [trial.name for trial in place.book.trials if trial.state == "running"]
    assert all(trial.values["optim.lr"] >= 5e-5 and "'optim.lr < 5e-5' does not hold" in trial.problem
               for trial in refused)  # fmt: skip
    assert [line.split()[0] for line in place.said] == [trial.name for trial in refused]


class Unlucky:
    """Proposes what is refused, from some trial on."""

    is_finite = False

    def __init__(self, good: int) -> None:
        self.good = good
        self.told: list[tuple[int, str]] = []

    def propose(self, number: int) -> Mapping[str, Any]:
        return {"optim.lr": 1e-4 if number < self.good else 9e-4}

    def tell(self, number: int, trial: Trial) -> None:
        self.told.append((number, trial.state))


def test_draws_that_are_all_refused_end_the_search(tmp_path: Path) -> None:
    config = searching(RATE, "tune.trials=3", "tune.constraints=['optim.lr < 2e-4']")
    place = Place(tmp_path, config, proposer := Unlucky(1))
    assert [place.next() for _ in range(3)] == ["t000", None, None]
    assert len(place.book.trials) == 1 + MOST_REFUSED and place.exhausted == 1
    assert place.said[-1] == f"WARNING: {MOST_REFUSED} draws in a row were refused; no more trials are begun"
    assert proposer.told == [(number, "refused") for number in range(1, 1 + MOST_REFUSED)]
    place.book.end("t000", "finished")
    assert place.next() == "FINISHED" and proposer.told[-1] == (0, "finished")


def test_a_resumed_search_goes_on_with_trials_that_are_not_over(tmp_path: Path) -> None:
    config = searching(RATE, "tune.trials=4")
    place = Place(tmp_path, config)
    for _ in range(3):
        place.next()
    place.book.end("t000", "finished")
    drawn = [trial.values for trial in place.book.trials]
    place = Place(tmp_path, config, None, place.book.trials)
    assert [place.next() for _ in range(4)] == ["t001", "t002", "t003", None]
    uninterrupted = [SearchSpace.from_config(config).proposal(number, config.tune) for number in range(4)]
    assert [trial.values for trial in place.book.trials] == uninterrupted and drawn == uninterrupted[:3]


def test_a_grid_has_its_points_as_trials(tmp_path: Path) -> None:
    config = searching({"optim.lr": {"grid": [1e-4, 1e-3]}, "loss.ce": {"grid": [1, 2]}}, "tune.searcher=grid")
    place = Place(tmp_path, config)
    assert [place.next() for _ in range(5)] == ["t000", "t001", "t002", "t003", None]
    assert place.exhausted == 1 and config.tune.trials == 8
    assert [tuple(trial.values.values()) for trial in place.book.trials] == [
        (1e-4, 1), (1e-4, 2), (1e-3, 1), (1e-3, 2),
    ]  # fmt: skip


def test_a_grid_goes_on_after_any_number_of_refused_points(tmp_path: Path) -> None:
    points = [number / 1000 for number in range(1, MOST_REFUSED + 3)]
    config = searching(
        {"optim.lr": {"grid": points}}, "tune.searcher=grid", f"tune.constraints=['optim.lr > {points[-3]}']",
        f"tune.trials={len(points)}",
    )  # fmt: skip
    place = Place(tmp_path, config)
    assert place.next() == f"t{MOST_REFUSED}" and place.next() == f"t{MOST_REFUSED + 1}" and place.exhausted == 0
    assert place.next() is None and place.exhausted == 1


MIXED = {
    **RATE,
    "loss.giou": {"quniform": [0.1, 1.05, 0.1]},
    "loss.ce": {"uniform": [1, 4]},
    "model.num_queries": {"randint": [10, 14]},
    "optim.schedule": {"choice": ["multistep", "cosine"]},
    "optim.milestones": {"choice": [[0.5], [0.5, 0.75]]},
}


def score(values: Mapping[str, Any]) -> float:
    """A metric: the nearer to some values, the better."""
    return -abs(values["loss.giou"] - 0.3) - abs(values["loss.ce"] - 2)


def proposals(tpe: OptunaTpe, numbers: range, sign: int = 1) -> list[Mapping[str, Any]]:
    """What is proposed for some trials, each of which ends before the next one begins."""
    found = []
    for number in numbers:
        found.append(values := tpe.propose(number) or {})
        tpe.tell(number, Trial(f"t{number:03d}", values, "finished").measured(1, 4, sign * score(values), "max"))
    return found


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_tpe_repeats_with_a_seed_and_proposes_possible_values() -> None:
    def drawn(seed: int) -> list[Mapping[str, Any]]:
        config = searching(MIXED, "tune.searcher=tpe", f"tune.seed={seed}")
        return proposals(OptunaTpe(SearchSpace.from_config(config), config.tune, []), range(30))

    first = drawn(3)
    assert first == drawn(3) != drawn(4)
    for values in first:
        assert values["loss.giou"] in [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "decimal numbers, exactly"
        assert type(values["model.num_queries"]) is int and 10 <= values["model.num_queries"] <= 14
        assert values["optim.milestones"] in ([0.5], [0.5, 0.75])
        assert 1e-5 <= values["optim.lr"] <= 1e-3 and 1 <= values["loss.ce"] <= 4
    assert {values["model.num_queries"] for values in first} >= {10, 14}, "both ends"


def test_tpe_learns() -> None:
    """After its random beginning, trials are near the best ones."""
    space = {"loss.ce": {"uniform": [0, 10]}, "loss.giou": {"quniform": [0.1, 1, 0.1]}}
    for mode, sign in (("max", 1), ("min", -1)):
        config = searching(space, "tune.searcher=tpe", f"tune.mode={mode}")
        tpe = OptunaTpe(SearchSpace.from_config(config), config.tune, [])
        scores = [score(values) for values in proposals(tpe, range(40), sign)]
        assert sum(scores[30:]) / 10 > sum(scores[:10]) / 10 + 1


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_tpe_goes_on_with_what_an_earlier_process_found(tmp_path: Path) -> None:
    """Also where a trial that the earlier process proposed ends in this one, has failed, or was refused."""
    config = searching(MIXED, "tune.searcher=tpe", "tune.trials=9")
    space = SearchSpace.from_config(config)
    values = proposals(OptunaTpe(space, config.tune, []), range(5))
    earlier = [Trial(f"t{number:03d}", drawn) for number, drawn in enumerate(values)]
    for number, state in ((0, "finished"), (1, "stopped early")):
        earlier[number] = dataclasses.replace(earlier[number], state=state).measured(1, 4, 0.5, "max")
    earlier[2] = dataclasses.replace(earlier[2], state="failed", problem="a fault")
    earlier[3] = dataclasses.replace(earlier[3], state="refused", problem="a rule")
    earlier[4] = dataclasses.replace(earlier[4], state="running")
    drawn = []
    for folder in ("one", "again"):
        place = Place(tmp_path / folder, config, OptunaTpe(space, config.tune, earlier), earlier)
        place.room = 1
        begun = []
        while (name := place.next()) != "FINISHED":
            assert name is not None
            begun.append(name)
            place.book.measure(name, 1, 4, score(place.book[name].values))
            place.book.end(name, "finished")
        assert begun == ["t004", "t005", "t006", "t007", "t008", "t009"]
        assert [trial.values for trial in place.book.trials[:5]] == values
        drawn.append([trial.values for trial in place.book.trials])
    assert drawn[0] == drawn[1] and all(new not in values for new in drawn[0][5:])


def test_tpe_of_a_resumed_search_knows_the_earlier_values() -> None:
    config = searching({"loss.ce": {"uniform": [0, 10]}}, "tune.searcher=tpe")
    rng = random.Random(0)
    earlier = []
    for number in range(30):
        value = rng.uniform(0, 10)
        known = Trial(f"t{number:03d}", {"loss.ce": value}, "finished")
        earlier.append(known.measured(1, 4, -abs(value - 7), "max"))
    tpe = OptunaTpe(SearchSpace.from_config(config), config.tune, earlier)
    proposed = [(tpe.propose(number) or {})["loss.ce"] for number in range(30, 36)]
    assert sum(abs(value - 7) < 2 for value in proposed) >= 5, proposed
