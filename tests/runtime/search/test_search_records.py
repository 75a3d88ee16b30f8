"""What a search leaves at its end: files, pictures and a page about it; nothing runs, and nothing is tracked."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny import make_dataset, tiny_config

from detr_ray.engine.opened_data import open_data
from detr_ray.runtime.search import records
from detr_ray.runtime.search.directory import open_search
from detr_ray.runtime.search.records import SearchRecords
from detr_ray.search.book import Book
from detr_ray.search.space import SearchSpace
from detr_ray.search.tables import Ending

RATE = "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"


class Ended:
    """The records of a search with one trial that was measured, one that failed and one that was stopped."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        data = make_dataset(folder / "data", num_train=8, num_val=4)
        config = tiny_config(data, folder / "runs", RATE, "tune.name=mine", "tracking.report=true", *overrides)
        opened = open_data(config.data, lambda line: None)
        self.train = opened[0]
        self.folder = folder / "runs" / "mine"
        self.said: list[str] = []
        directory = open_search(config, {}, resume=False)
        with directory.locked(self.said.append):
            pass
        book = Book(directory.path, "max", 0)
        for rate in (1e-4, 2e-4, 3e-4):
            book.start(book.add({"optim.lr": rate}).name)
        book.measure("t000", 1, 5, 0.25)
        book.end("t000", "finished")
        book.end("t001", "failed", "the loss <is> NaN")
        book.end("t002", "stopped")
        space = SearchSpace.from_config(config)
        self.records = SearchRecords(config, opened, space, directory, book, None, self.said.append)

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
