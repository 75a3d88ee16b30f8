"""What a search leaves at its end: files, pictures and a page about it; nothing runs, and nothing is tracked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image
from tiny import make_dataset, tiny_config

from detr_ray.engine.opened_data import open_data
from detr_ray.runtime.search import records
from detr_ray.runtime.search.directory import open_search
from detr_ray.runtime.search.records import SearchRecords
from detr_ray.search.book import Book
from detr_ray.search.confirmation import compare
from detr_ray.search.space import SearchSpace
from detr_ray.search.tables import Ending
from detr_ray.tracking.search_children import ChildState
from detr_ray.viz.figure import message_figure

RATE = "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"


class Ended:
    """The records of a search with one trial that was measured, one that failed and one that was stopped."""

    def __init__(self, folder: Path, *overrides: str, tracking_uri: str | None = None) -> None:
        data = make_dataset(folder / "data", num_train=8, num_val=4)
        config = tiny_config(data, folder / "runs", RATE, "tune.name=mine", "tracking.report=true", *overrides)
        opened = open_data(config.data, lambda line: None)
        self.train = opened[0]
        self.folder = folder / "runs" / "mine"
        self.said: list[str] = []
        directory = open_search(config, {}, resume=False)
        with directory.locked(self.said.append):
            pass
        self.book = book = Book(directory.path, "max", 0)
        for rate in (1e-4, 2e-4, 3e-4):
            book.start(book.add({"optim.lr": rate}).name)
        book.measure("t000", 1, 5, 0.25)
        book.end("t000", "finished")
        book.end("t001", "failed", "the loss <is> NaN")
        book.end("t002", "stopped")
        space = SearchSpace.from_config(config)
        self.records = SearchRecords(config, opened, space, directory, book, tracking_uri, self.said.append)

    def end(self, ending: Ending = "finished") -> None:
        self.records.end(ending, {"best.yaml": "optim:\n  lr: 0.0001\n"}, 75.0)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


def test_a_search_leaves_its_trials_its_pictures_and_a_page_about_it(tmp_path: Path) -> None:
    search = Ended(tmp_path)
    search.end()
    assert "t001 failed: the loss <is> NaN" in search.read("trials.txt") and search.read("best.yaml").startswith("opt")
    for name in ("history.png", "parallel_coordinates.png"):
        assert Image.open(search.folder / name).size[0] > 300
    page = search.read("report.html")
    assert search.records.report == str(search.folder / "report.html")
    for expected in (
        "<h1>Search mine</h1>", "It finished after 1 min 15 s; 3 trials", "the best is t000: val/AP 0.2500",
        "1 of 3 trials failed (t001: the loss &lt;is&gt; NaN)", "1 of 3 trials did not come to their end",
        "optim.lr</td><td>{loguniform: [", "8, with", search.train.fingerprint[:16], "1 trial was compared",
        f"python -m detr_ray.train --config {search.folder}/best.yaml", "hidden_dim: 32", "tune.name=mine",
    ):  # fmt: skip
        assert expected in page, expected
    assert page.count("data:image/svg") == 2 and 'src="http' not in page and search.said == []


@pytest.mark.parametrize(("ending", "said"), [("stopped", "was stopped"), ("out of time", "ran out of time")])
def test_the_page_says_why_a_search_ended(tmp_path: Path, ending: Ending, said: str) -> None:
    search = Ended(tmp_path)
    search.end(ending)
    page = search.read("report.html")
    assert f"It {said} after 1 min 15 s; 3 trials" in page and "--resume tune.name=mine" in page


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise ValueError("nothing can be drawn")

    monkeypatch.setattr(records, "history", refuse)
    search = Ended(tmp_path)
    search.end()
    assert search.read("trials.txt") and search.read("best.yaml")
    assert search.said == [
        "WARNING: the pictures and the report of the search could not be written: nothing can be drawn"
    ]
    assert not (search.folder / "report.html").exists()


def test_without_reports_there_is_no_page(tmp_path: Path) -> None:
    search = Ended(tmp_path, "tracking.report=false")
    search.end()
    assert (search.folder / "history.png").is_file() and not (search.folder / "report.html").exists()
    assert search.records.report is None


class StoredRun:
    """An MLflow run of a search, in memory.

    Attributes:
        stored: (path, content) of what was logged.
        ends: how it was closed, each time.
    """

    stored: ClassVar[list[tuple[str, bytes]]]
    ends: ClassVar[list[str]]

    def __init__(self, folder: Path, **settings: object) -> None:
        assert settings["uri"] == "sqlite:///mlflow.db" and settings["uid"], "each time the same run"

    def describe(self, *settings: object) -> None: ...

    def log_progress(self, *numbers: object) -> None: ...

    def reconcile(self, children: object) -> None: ...

    def log_bytes(self, content: bytes, path: str) -> None:
        self.stored.append((path, content))

    def close(self, status: str, children: Sequence[ChildState]) -> None:
        self.ends.append(status)
        assert [child.trial for child in children] == ["t001"], "the others have no runs here"


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that take no time, where the page is written often."""
    for name in ("history", "parallel_coordinates"):
        monkeypatch.setattr(records, name, lambda *_, **__: message_figure("a picture"))


@pytest.mark.usefixtures("plain_pictures")
def test_the_page_tells_whether_the_best_configuration_is_better_or_only_lucky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoredRun.stored, StoredRun.ends = [], []
    monkeypatch.setattr(records, "SearchRun", StoredRun)
    search = Ended(tmp_path, "run.seed=7", tracking_uri="sqlite:///mlflow.db")
    search.end("stopped")
    assert "tune --config ... --resume tune.name=mine --confirm 4" in search.read("report.html")
    better = compare([0.62, 0.63, 0.61, 0.64], [0.58, 0.59, 0.6, 0.57])
    search.records.confirmed(better)
    page = search.read("report.html")
    for expected in (
        f"<p>{better.verdict}</p></header>", "difference +0.0400, p = 0.0286", "best (t000)",
        "confirm-t000-1007 and confirm-default-1007",
        '<td>seed 1008</td><td class="number">0.6300</td><td class="number">0.5900</td>',
        '<td>mean</td><td class="number">0.6250</td><td class="number">0.5850</td>',
    ):  # fmt: skip
        assert expected in page, expected
    assert "not shown to be better" not in page and "--confirm" not in page and search.said == []
    assert StoredRun.stored[-1] == ("report.html", page.encode()) and StoredRun.ends == ["KILLED"] * 2
    search.records.confirmed(compare([0.62, 0.63], [0.58, 0.59]))
    assert "not shown to be better than the default one" in search.read("report.html")


@pytest.mark.usefixtures("plain_pictures")
def test_a_resumed_search_keeps_what_confirms_the_trial_that_is_still_the_best(tmp_path: Path) -> None:
    search = Ended(tmp_path)
    search.end()
    search.records.confirmed(compare([0.62] * 4, [0.58] * 4))
    search.records.end("finished", {"best.yaml": ""}, 80.0)
    assert "is better than the default one by more than noise" in search.read("report.html")
    search.book.start(search.book.add({"optim.lr": 1e-5}).name)
    search.book.measure("t003", 1, 5, 0.5)
    search.records.end("finished", {"best.yaml": ""}, 90.0)
    page = search.read("report.html")
    assert "the best is t003" in page and "by more than noise" not in page and "--confirm 4" in page
    (search.folder / "confirmation.json").write_text('{"run": "t003"}')
    search.records.end("finished", {"best.yaml": ""}, 90.0)
    assert search.said[-1].endswith("mine/confirmation.json: damaged ('best'); --confirm writes it anew")
    assert "the best is t003" in search.read("report.html")
    (search.folder / "confirmation.json").unlink()
    (search.folder / "confirmation.json").mkdir()
    search.records.confirmed(compare([0.62] * 4, [0.58] * 4))
    assert search.said[-1].startswith("WARNING: what confirms the best configuration could not be")
