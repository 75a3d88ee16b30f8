"""The book of a running search: states of its trials, and the file that is written at each change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from detr_ray.search import Trial, read_trials
from detr_ray.search import book as module
from detr_ray.search.book import Book


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def kept(folder: Path, book: Book) -> list[Trial]:
    """The trials in the file, which are those of the book."""
    trials = read_trials(str(folder))
    assert trials == book.trials
    return trials


def test_every_change_is_written(tmp_path: Path) -> None:
    book = Book(str(tmp_path), "max", 1)
    assert kept(tmp_path, book) == [] and (tmp_path / "trials.json").exists()
    assert book.add({"lr": 1.0}) == Trial("t000", {"lr": 1.0}, "waiting")
    assert book.add({"lr": 2.0}, "lr: is too high") == Trial("t001", {"lr": 2.0}, "refused", "lr: is too high")
    assert [trial.state for trial in kept(tmp_path, book)] == ["waiting", "refused"]
    waiting = book.next_waiting()
    assert waiting is not None and waiting.name == "t000"
    book.start("t000")
    assert kept(tmp_path, book)[0].state == "running" and book["t000"].attempts == 1 and book.next_waiting() is None
    book.set_path("t000", "/runs/t000")
    assert kept(tmp_path, book)[0].run_path == "/runs/t000"
    for epoch, value in ((1, 0.25), (2, 0.5), (3, 0.125)):
        book.measure("t000", epoch, epoch * 4, value)
        assert kept(tmp_path, book)[0].value == value
    found = kept(tmp_path, book)[0]
    assert (found.epoch, found.step, found.best, found.best_epoch) == (3, 12, 0.5, 2) and book.num_results == 3
    assert found.history == ((1, 4, 0.25), (2, 8, 0.5), (3, 12, 0.125))
    book.end("t000", "stopped early")
    assert [trial.state for trial in kept(tmp_path, book)] == ["stopped early", "refused"]
    assert book.counts == {"stopped early": 1, "refused": 1}


def test_a_storage_that_fails_for_a_while_loses_nothing(tmp_path: Path, clock: list[float]) -> None:
    said: list[str] = []
    book = Book(str(tmp_path), "max", 1, say=said.append)
    book.add({"lr": 1.0})
    file = tmp_path / "trials.json"
    (tmp_path / "kept").mkdir()
    file.rename(tmp_path / "kept" / "trials.json")
    (file / "in the way").mkdir(parents=True)
    book.start("t000")
    book.measure("t000", 1, 4, 0.5)
    (warning,) = said
    assert warning.startswith(f"WARNING: the trials cannot be written to {tmp_path} (") and book["t000"].best == 0.5
    (file / "in the way").rmdir()
    file.rmdir()
    clock[0] += 9
    book.set_path("t000", "/runs/t000")
    book.save_again()
    assert not file.exists(), "a storage that fails is not asked several times a second"
    clock[0] += 1
    book.save_again()
    found = kept(tmp_path, book)[0]
    assert (found.best, found.run_path) == (0.5, "/runs/t000") and said[1:] == [
        f"the trials are written to {tmp_path} again"
    ]
    file.unlink()
    book.save_again()
    assert not file.exists(), "nothing is left to write"


def test_the_best_follows_the_mode(tmp_path: Path) -> None:
    for mode, best in (("max", "t001"), ("min", "t000")):
        book = Book(str(tmp_path / mode), mode, 1)
        assert book.best is None
        for name, value in (("t000", 0.25), ("t001", 0.75)):
            book.add({})
            book.start(name)
            book.measure(name, 1, 4, 0.5)
            book.measure(name, 2, 8, value)
        assert book.best is not None and book.best.name == best


def test_a_trial_that_fails_waits_again_so_many_times(tmp_path: Path) -> None:
    book = Book(str(tmp_path), "max", 2)
    book.add({})
    for again in (1, 2):
        book.start("t000")
        failed = book.fail("t000", f"fault {again}", again=True)
        assert (failed.state, failed.problem, failed.failures) == ("waiting", f"fault {again}", again)
        kept(tmp_path, book)
    assert book.start("t000").problem == "", "it may succeed now"
    failed = book.fail("t000", "fault 3", again=True)
    assert (failed.state, failed.problem, failed.attempts) == ("failed", "fault 3", 3)
    assert kept(tmp_path, book) == [failed]


def test_a_failure_that_would_come_again_is_final(tmp_path: Path) -> None:
    book = Book(str(tmp_path), "max", 5)
    book.add({})
    book.start("t000")
    assert book.fail("t000", "the loss is NaN", again=False).state == "failed"


def test_interruptions_of_the_search_are_no_failures_of_its_trials(tmp_path: Path) -> None:
    book = Book(str(tmp_path), "max", 1)
    book.add({})
    for _ in range(3):
        book.start("t000")
        book = Book(str(tmp_path), "max", 1, read_trials(str(tmp_path)))
    book.start("t000")
    assert book.fail("t000", "the first fault", again=True).state == "waiting"
    book = Book(str(tmp_path), "max", 1, read_trials(str(tmp_path)))
    book.start("t000")
    assert book.fail("t000", "the second fault", again=True).state == "failed", "also over a resume"


def test_a_resumed_search_goes_on_with_what_is_not_over(tmp_path: Path) -> None:
    states = ("finished", "running", "stopped early", "failed", "refused", "stopped", "waiting")
    before = [Trial(f"t00{number}", {"lr": number}, state) for number, state in enumerate(states)]
    before[1] = before[1].measured(1, 4, 0.5, "max")
    book = Book(str(tmp_path), "max", 1, before)
    now = kept(tmp_path, book)
    assert [trial.state for trial in now] == [
        "finished", "waiting", "stopped early", "failed", "refused", "waiting", "waiting",
    ]  # fmt: skip
    assert now[1].history == before[1].history and book.num_results == 1
    order = []
    while (trial := book.next_waiting()) is not None:
        order.append(book.start(trial.name).name)
    assert order == ["t001", "t005", "t006"]
    assert book.add({}).name == "t007"


def test_a_moved_trial_has_the_past_of_its_donor(tmp_path: Path) -> None:
    for mode, best in (("max", (0.9, 1)), ("min", (0.3, 2))):
        book = Book(str(tmp_path / mode), mode, 1)
        for name, values in (("t000", (0.9, 0.3, 0.1)), ("t001", (0.5, 0.4, 0.95))):
            book.add({"lr": name})
            book.start(name)
            for epoch, value in enumerate(values, 1):
                book.measure(name, epoch, epoch * 4, value)
        book.move("t001", {"lr": "new"}, 1, book["t000"], 8)
        moved = kept(tmp_path / mode, book)[1]
        assert moved.history == ((1, 4, 0.9), (2, 8, 0.3)), "what the donor did later is not its past"
        assert (moved.epoch, moved.step, moved.value) == (2, 8, 0.3) and (moved.best, moved.best_epoch) == best
        assert (moved.values, moved.generation, moved.state) == ({"lr": "new"}, 1, "running")
        assert book["t000"].history[-1] == (3, 12, 0.1) and book["t000"].generation == 0


def test_a_moved_trial_keeps_the_best_that_it_had_reached(tmp_path: Path) -> None:
    for sign, mode in ((1, "max"), (-1, "min")):
        book = Book(str(tmp_path / mode), mode, 1)
        for name, values in (("t000", (0.2, 0.3, 0.4)), ("t001", (0.7, 0.1, 0.9)), ("t002", (0.5, 0.5, 0.5))):
            book.add({"lr": name})
            book.start(name)
            for epoch, value in enumerate(values, 1):
                book.measure(name, epoch, epoch * 4, sign * value)
        book.move("t001", {"lr": "new"}, 1, book["t000"], 8)
        moved = kept(tmp_path / mode, book)[1]
        assert moved.left == (0, 1, 4, sign * 0.7) and moved.value == sign * 0.3
        assert (moved.best, moved.best_epoch) == (sign * 0.7, 1) and book.best == moved, "not the 0.9 after the round"
        book.measure("t001", 3, 12, sign * 0.6)
        book.move("t001", {"lr": "newer"}, 2, book["t002"], 12)
        again = Book(str(tmp_path / mode), mode, 1, kept(tmp_path / mode, book))["t001"]
        assert again.left == (0, 1, 4, sign * 0.7) and again.best == sign * 0.7
        assert again.measured(4, 16, sign * 0.8, mode).best == sign * 0.8


def test_seconds_are_those_of_all_attempts(tmp_path: Path, clock: list[float]) -> None:
    book = Book(str(tmp_path), "max", 1)
    book.add({})
    book.add({})
    clock[0] = 110
    book.start("t000")
    clock[0] = 113
    assert [trial.seconds for trial in book.trials] == [3, 0]
    book.fail("t000", "a fault", again=True)
    clock[0] = 120
    assert book.trials[0].seconds == 3, "it waits"
    book.start("t000")
    clock[0] = 125
    book.end("t000", "finished")
    clock[0] = 200
    assert [trial.seconds for trial in kept(tmp_path, book)] == [8, 0]
