"""What the driver of a search notes when Ray Tune tells it of results and ends; nothing runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr_ray.runtime.search.control import Progress
from detr_ray.runtime.search.watch import Moves, SearchWatch
from detr_ray.search.book import Book
from detr_ray.search.population import Move, Population, Report


class Place:
    """A watch of a book with two running trials, and what it says."""

    def __init__(self, folder: Path) -> None:
        self.book = Book(str(folder), "max", 1)
        self.said: list[str] = []
        records: Any = SimpleNamespace(
            metric="val/AP", mode="max", parameters=["lr"], progress=lambda: None, path_of=lambda name: f"/runs/{name}"
        )
        self.control: Any = SimpleNamespace(exchange=lambda: None, stop=lambda: None, progress={})
        self.why_stop = ""
        self.done: list[float] = []
        self.watch = SearchWatch(
            self.book, self.control, records, lambda: self.why_stop, self.said.append, self.done.append
        )
        self.trials = {}
        for number in range(2):
            trial = self.book.add({"lr": float(number)})
            self.book.start(trial.name)
            self.trials[trial.name] = SimpleNamespace(
                trial_id=f"id {number}", config={"trial": trial.name}, get_error=lambda: RuntimeError("gone")
            )

    def result(self, name: str, epoch: int, value: float, **more: Any) -> None:
        """An evaluation, with what Ray Tune adds."""
        result = {"generation": self.book[name].generation, "epoch": epoch, "step": epoch * 5, "value": value,
                  "checkpoint": f"/runs/{name}/{epoch}", "done": False, **more}  # fmt: skip
        self.watch.on_trial_result(0, [], self.trials[name], result)

    def complete(self, name: str) -> None:
        self.watch.on_trial_complete(0, [], self.trials[name])


END = {"done": True, "problem": "", "again": False, "stopped": False}


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"done": True}, "stopped early"),  # Ray Tune marks the result at which its scheduler stops a trial
        (END, "finished"),
        ({**END, "stopped": True}, "stopped"),
        ({**END, "problem": "the loss is NaN"}, "failed"),
        ({**END, "problem": "a worker was lost", "again": True}, "waiting"),
    ],
)
def test_how_a_trial_ended(tmp_path: Path, last: dict[str, Any], state: str) -> None:
    place = Place(tmp_path)
    place.result("t000", 1, 0.25)
    place.result("t000", 2, 0.5, **last)
    place.complete("t000")
    trial = place.book["t000"]
    assert (trial.state, trial.problem, trial.epoch, trial.value) == (state, last.get("problem", ""), 2, 0.5)
    assert any(line.startswith("t000 is the best so far: val/AP 0.250 at epoch 1") for line in place.said)


def test_how_much_of_the_search_is_done_counts_parts_of_trials(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.watch.on_step_end(0, [])
    place.control.progress = {"t000": Progress(0.25), "t001": Progress(0.75)}
    place.watch.on_step_end(0, [])
    place.result("t001", 1, 0.25, done=True)  # stopped early: its other three quarters are not left to do
    place.complete("t001")
    place.watch.on_step_end(0, [])
    assert place.done == [0.0, 1.0, 1.25]


def test_a_trial_whose_process_was_lost_is_tried_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for state in ("waiting", "failed"):
        place.watch.on_trial_error(0, [], place.trials["t000"])
        assert place.book["t000"].state == state
    assert "gone" in place.book["t000"].problem and place.said[-1].startswith("WARNING: t000 failed")


def test_trials_that_end_after_a_wish_to_stop_can_go_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.why_stop = "asked to stop"
    place.watch.on_step_end(0, [])
    place.result("t000", 1, 0.25, **{**END, "problem": "a worker was lost", "again": True})
    place.complete("t000")
    place.complete("t001")
    assert [trial.state for trial in place.book.trials] == ["stopped", "stopped"]
    place.book.add({})
    place.watch.end_all()
    assert [trial.state for trial in place.book.trials] == ["stopped"] * 3


def test_a_population_is_told_what_the_book_knew_before(tmp_path: Path) -> None:
    """A driver may be killed after it wrote the book, and before it wrote what the population knows."""
    place = Place(tmp_path)
    place.book.measure("t000", 1, 5, 0.25)
    made = Population(2, lambda values, chance: values, every_epochs=1, epochs=3, quantile=0.5, mode="max", seed=0)
    for name in place.trials:
        made.add(name, {"lr": 1.0})
    carried_out: list[Move] = []
    moves: Any = carried_out.extend
    place.watch.follow(made, moves)
    place.result("t000", 1, 0.25)
    assert made.members["t000"].reports == {1: Report(1, 5, 0.25, "/runs/t000/1")}
    assert place.book["t000"].history == ((1, 5, 0.25),) and place.book.num_results == 1
    place.result("t001", 1, 0.5)
    assert [(move.receiver, move.donor) for move in carried_out] == [("t000", "t001")]
    place.result("t001", 1, 0.5, generation=7)
    assert place.book.num_results == 2


def population_of(place: Place, epochs: int = 3) -> Population:
    """A population of the place's trials."""
    made = Population(2, lambda values, chance: values, every_epochs=1, epochs=epochs, quantile=0.5, mode="max", seed=0)
    for name in place.trials:
        made.add(name, {"lr": 1.0})
    return made


def at_end(place: Place, name: str) -> None:
    """A trial says that it has taken its last step."""
    place.watch.on_trial_result(0, [], place.trials[name], {"generation": 0, "done": False, "waits": True})


def test_a_trial_at_its_end_waits_for_no_evaluation(tmp_path: Path) -> None:
    place = Place(tmp_path)
    carried_out: list[Move] = []
    moves: Any = carried_out.extend
    place.watch.follow(population_of(place, epochs=2), moves)
    place.result("t000", 1, 0.25)
    at_end(place, "t001")
    assert [(move.receiver, move.donor) for move in carried_out] == [("t001", "t000")]
    assert place.book["t001"].history == ()


def test_a_trial_without_room_is_given_up_when_all_others_only_wait_for_it(tmp_path: Path) -> None:
    """Its node was lost for good, for example."""
    place, ended = Place(tmp_path), []
    made = population_of(place)
    moves: Any = lambda moves: None  # noqa: E731
    place.watch.follow(made, moves, 0.05, lambda: ended.append("no more"))
    for epoch in (1, 2):
        place.result("t000", epoch, 0.25)
    place.watch.on_trial_error(0, [], place.trials["t001"])
    time.sleep(0.06)
    place.watch.on_step_end(0, [])
    assert place.book["t001"].state == "waiting" and not ended, "t000 still trains"
    at_end(place, "t000")
    place.watch.on_step_end(0, [])
    assert place.book["t001"].state == "waiting"
    time.sleep(0.06)
    place.watch.on_step_end(0, [])
    assert any("t000 wait at their ends" in line for line in place.said)
    assert place.book["t001"].state == "failed" and "no room" in place.book["t001"].problem
    assert ended == ["no more"] and made.decided_epoch == made.last_round == 2


def test_moves_keep_their_seconds_for_a_resumed_search(tmp_path: Path) -> None:
    place = Place(tmp_path)
    made, written = population_of(place), list[Any]()
    directory: Any = SimpleNamespace(write_population=written.append)
    records: Any = SimpleNamespace(path_of=lambda name: name)
    moves = Moves(made, place.book, place.control, directory, records, place.said.append)
    made.report("t000", 0, Report(1, 5, 0.25, "a"))
    made.report("t001", 0, Report(1, 5, 0.5, "b"))
    place.control.progress = {"t000": Progress(0.5, {1: 2.5})}
    moves.save()
    restored = population_of(place)
    restored.restore(json.loads(json.dumps(written[-1])))
    place.control.progress = {}
    again = Moves(restored, place.book, place.control, directory, records, place.said.append)
    again.save()
    assert again.exploits().splitlines()[1].split()[:5] == ["1", "t000-g1", "t001", "5", "2.5"]
