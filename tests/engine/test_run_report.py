"""What a run leaves for its report, and what the report says: of one run, of two, of one that has little."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from observing import Observed, observe, small_config
from tiny import make_dataset

from detr_ray.config import ConfigError
from detr_ray.config.data_sections import SourceConfig
from detr_ray.engine.past_run import PastRun, keep_best_found, open_past_run
from detr_ray.engine.run_report import at_end
from detr_ray.engine.run_report.comparison import comparison_report
from detr_ray.engine.run_report.problems import find_problems
from detr_ray.engine.run_report.report import Reported, run_report
from detr_ray.engine.run_report.search_page import search_report
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.tracking import MemoryTracker
from detr_ray.tracking.event_log import EventLog
from detr_ray.tracking.history import RunHistory, Session
from detr_ray.viz.figure import message_figure


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Two epochs, and their metrics in the log as the tracker of a recorded run writes them."""
    folder = tmp_path_factory.mktemp("report")
    data = make_dataset(folder / "shapes", num_train=16, num_val=4)
    keys = ("run.name=mine", "train.epochs=2", "optim.lr=1e-3", "tracking.report=true")
    seen = observe(small_config(data, folder / "runs", *keys))
    log = EventLog(Path(seen.job.run.path) / "tracking")
    log.append("start")
    log.append("tags", tags={"data.train.images": "16", "torch.version": "9.9<b>"})
    for step, metrics in seen.tracker.metrics:
        log.append("metrics", step=step, metrics=metrics)
    log.close()
    return seen


@pytest.fixture
def past(trained: Observed) -> PastRun:
    return open_past_run(trained.job.run.path)


class Page(HTMLParser):
    """What a browser would find: texts, links, sources, and whether every element is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.texts: list[str] = []
        self.feed(content)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_the_best_weights_detections_are_kept_with_the_annotations(trained: Observed, past: PastRun) -> None:
    best = trained.store.best()
    assert past.best is not None and best is not None and past.best.step == best.step
    val = trained.job.data.val
    assert val is not None and np.array_equal(past.best.truth.boxes_xywh_px, val.boxes_xywh_px)
    scores = evaluate_detections(past.best.truth, past.best.detections)
    assert best.metrics is not None and scores.summary["AP"] == pytest.approx(best.metrics["val/AP"], abs=1e-12)
    assert past.curves()["val/AP"][0].tolist() == [1.0, 2.0], "in epochs"


def test_training_ends_with_a_report_that_is_whole_by_itself(trained: Observed, past: PastRun) -> None:
    said: list[str] = []
    tracker = MemoryTracker()
    assert trained.result is not None
    at_end.report_at_end(trained.job, trained.result, tracker, said.append)
    report = Path(trained.job.run.path) / "report.html"
    assert str(report) in said[0] and tracker.files[-1] == (str(report), "")

    content = report.read_text()
    page = Page(content)
    assert all(address.startswith(("data:", "#")) for address in page.addresses), "no request to any network"
    assert {link[1:] for link in page.addresses if link.startswith("#")} <= page.anchors
    assert "default-src 'none'" in content
    assert sum(address.startswith("data:image/svg") for address in page.addresses) == 7
    assert sum(address.startswith("data:image/jpeg") for address in page.addresses) >= 2, "first batch, worst images"
    pictures = [Path(path) for path, folder in tracker.files if folder == "pictures"]
    curves = {"training", "schedules", "times", "precision-recall", "sizes", "errors", "confusion"}
    assert {path.name for path in pictures} >= {f"{name}.svg" for name in curves} | {"batch.jpg", "worst.jpg"}
    contents = [base64.b64decode(address.partition(",")[2]) for address in page.addresses if "base64" in address]
    assert [path.read_bytes() for path in pictures] == contents, "the pictures of the page, and drawn once"
    summary = evaluate_detections(past.best.truth, past.best.detections).summary  # type: ignore[union-attr]
    for expected in (
        "Run mine", "It finished", f"{summary['AP']:.3f}", "8 steps, 2.00 of 2 epochs", "optim.lr 0.001", "rectangle",
        "training images 16", "9.9<b>", f"eval.checkpoint={trained.job.run.path}", "costs",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_a_run_with_little_has_a_report_too(trained: Observed, past: PastRun) -> None:
    bare = dataclasses.replace(past, history=None, best=None, checkpoints=[])
    page = Page(run_report(bare).html)
    assert "There is no checkpoint" in page.text and "not on this machine" in page.text
    val, train = trained.job.data.val, trained.job.data.train
    with_images, without = Reported.of(past, val).found, Reported.of(past, train).found
    assert with_images is not None and with_images.index is val
    assert without is not None and without.index is None, "images of another data set are not the run's"


def test_it_says_where_the_data_lay_and_why_the_run_ended_early(past: PastRun) -> None:
    sources = (SourceConfig(root="/one"), SourceConfig(annotations="/two.json", images="/two", weight=2))
    data = past.config.data.model_copy(update={"root": None, "sources": sources})
    history = RunHistory(
        {"train/epoch": (np.array([4]), np.array([1.0]))}, {"run.ended_early": "no rise"}, [Session(0, 1, "FINISHED")]
    )
    config = past.config.model_copy(update={"data": data})
    page = Page(run_report(dataclasses.replace(past, config=config, history=history, best=None)).html)
    assert "data.sources [{" in page.text and "root: /one" in page.text and "annotations: /two.json" in page.text
    assert "data.root" not in page.text.split("On what")[-1].split("How it went")[0]
    assert "it ended early: no rise." in page.text


@pytest.mark.parametrize("first_step", [1, 5])
def test_a_log_that_begins_late_gets_its_beginning_from_the_store(
    trained: Observed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_step: int
) -> None:
    """As that of a run in a bucket has it which goes on on another machine."""
    record, config = (Path(trained.job.run.path) / name for name in ("run.json", "config.yaml"))
    (tmp_path / "run.json").write_bytes(record.read_bytes())
    (tmp_path / "config.yaml").write_text(config.read_text().replace("enabled: false", "enabled: true"))
    log = EventLog(tmp_path / "tracking")
    log.append("start")
    log.append("metrics", step=first_step, metrics={"train/epoch": 1.25, "train/loss": 3.0})
    log.close()
    values = {"train/loss": (np.array([1, 5]), np.array([9.0, 8.0])), "val/AP": (np.array([4]), np.array([0.5]))}
    sent = RunHistory(values, {"host": "other"}, [Session(0, 1 << 60, None)])
    monkeypatch.setattr("detr_ray.tracking.fetched_history.fetch_history", lambda *where: sent)
    history = open_past_run(str(tmp_path)).history
    assert history is not None
    steps, losses = history.metrics["train/loss"]
    if first_step == 1:
        assert (steps.tolist(), losses.tolist(), len(history.sessions)) == ([1], [3.0], 1)
        return
    assert (steps.tolist(), losses.tolist()) == ([1, 5], [9.0, 3.0]) and history.tags == {"host": "other"}
    assert "val/AP" in history.metrics and len(history.sessions) == 2
    assert history.sessions[0].ended_ms == history.sessions[1].began_ms, "no time counts twice"


def without_records(past: PastRun) -> PastRun:
    return dataclasses.replace(past, history=None, best=None)


def test_two_runs_side_by_side(past: PastRun) -> None:
    changed = past.config.model_copy(update={"train": past.config.train.model_copy(update={"epochs": 77})})
    other = dataclasses.replace(past, config=changed, directory=dataclasses.replace(past.directory, name="other"))
    page = Page(comparison_report(past, other))
    assert "train.epochs 2 77" in page.text and "+0.000" in page.text and "on the same images" in page.text
    elsewhere = {**past.record, "fingerprints": {"train": "a", "val": "b"}}
    moved, bare = dataclasses.replace(other, record=elsewhere, history=None, best=None), without_records(past)
    assert "say little about each other" in Page(comparison_report(bare, moved)).text


def test_a_search_has_a_page_too() -> None:
    figure = message_figure("trials")
    content = search_report("mine", "t000 <0.5>", "lr 0.9", {"best.yaml": "optim: {}"}, {"history.png": figure})
    page = Page(content)
    assert "Search mine" in page.text and "t000 <0.5>" in page.text and "--resume tune.name=mine" in page.text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def problems_of(past: PastRun, **metrics: list[float]) -> str:
    logged = {name: (np.arange(1, len(values) + 1), np.array(values)) for name, values in metrics.items()}
    history = RunHistory(logged, {}, [Session(0, 1, "FAILED")])
    return "; ".join(what for what, _ in find_problems(dataclasses.replace(past, history=history), None, None))


def test_what_looks_wrong(past: PastRun) -> None:
    assert "failed" in problems_of(past, **{"val/AP": [0.3]})
    assert "no validation" in problems_of(past)
    assert "AP is 0" in problems_of(past, **{"val/AP": [0.0, 0.0]})
    assert "fell from 0.500 to 0.300" in problems_of(past, **{"val/AP": [0.2, 0.5, 0.3]})
    assert "still rising" in problems_of(past, **{"val/AP": [0.1, 0.2, 0.3, 0.4]})
    assert "rising" not in problems_of(past, **{"val/AP": [0.1, 0.39, 0.4, 0.4]})
    assert "not finite in 1" in problems_of(past, **{"train/loss": [1.0, np.nan]})
    assert "3 steps were left out" in problems_of(past, **{"train/skipped_steps": [1.0, 2.0]})
    assert "30% of the time" in problems_of(past, **{"perf/data_wait_frac": [0.9, 0.3, 0.3]})
    assert "40% of all pixels" in problems_of(past, **{"perf/padding_frac": [0.4]})
    assert "waiting" not in problems_of(past, **{"perf/data_wait_frac": [0.9, 0.01]})


def test_categories_without_boxes_and_more_boxes_than_queries(past: PastRun) -> None:
    assert past.best is not None
    boxes = np.tile([[1.0, 1.0, 9.0, 9.0]], (7, 1))
    truth = GroundTruth(
        np.array([1]), np.array([0, 7]), boxes, np.full(7, 1), np.full(7, 81.0), np.zeros(7, bool), np.arange(7),
        ((1, "cat"), (2, "dog")),
    )  # fmt: skip
    found = DetectionTable.empty()
    best = dataclasses.replace(past.best, truth=truth, detections=found)
    said = find_problems(dataclasses.replace(past, best=best), evaluate_detections(truth, found), None)
    text = "; ".join(what for what, _ in said)
    assert "7 boxes, more than the 6 queries" in text and "1 of 2 categories have no box" in text and "dog" in text


def test_what_was_kept_and_is_damaged_is_left_out(past: PastRun, tmp_path: Path) -> None:
    assert past.best is not None
    keep_best_found(str(tmp_path), 7, past.best.truth, past.best.detections)
    for name in ("run.json", "config.yaml"):
        (tmp_path / name).write_bytes((Path(past.directory.path) / name).read_bytes())
    again = open_past_run(str(tmp_path)).best
    assert again is not None and again.step == 7
    assert np.array_equal(again.detections.scores, past.best.detections.scores)
    (tmp_path / "evaluation" / "best.npz").write_bytes(b"PK\x03\x04 not a whole file")
    said: list[str] = []
    assert open_past_run(str(tmp_path), said.append).best is None and "damaged" in said[0]
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=re.escape("config.yaml is missing")):
        open_past_run(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no folder of a run: it has no run\.json"):
        open_past_run(str(tmp_path / "evaluation"))


def test_only_whole_trainings_of_their_own_get_one_and_a_failure_is_a_warning(trained: Observed) -> None:
    job, tracker, said = trained.job, MemoryTracker(), []
    assert trained.result is not None
    for other in (
        (dataclasses.replace(job, parent_run="a search"), trained.result),
        (job, dataclasses.replace(trained.result, status="stopped")),
    ):
        at_end.report_at_end(*other, tracker, said.append)
    assert tracker.files == [] and said == []

    record = Path(job.run.path) / "run.json"
    record.rename(record.with_name("away"))
    try:
        at_end.report_at_end(job, trained.result, tracker, said.append)
    finally:
        record.with_name("away").rename(record)
    assert said[0].startswith("WARNING: the report could not be written") and "detr_ray.report" in said[0]
    assert tracker.files == []
