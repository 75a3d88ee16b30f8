"""What a run leaves for its report, and what the report says: of one run, of two, of one that has little."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from observing import Observed, observe, small_config, without_validation
from tiny import make_dataset

from detr_ray import report
from detr_ray.config import ConfigError, DataConfig, load_config
from detr_ray.config.data_sections import GenerateConfig, SourceConfig, SplitConfig
from detr_ray.engine import recorded_training
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.engine.past_run import PastRun, keep_best_found, open_past_run
from detr_ray.engine.run_report import at_end
from detr_ray.engine.run_report.comparison import comparison_report
from detr_ray.engine.run_report.problems import find_problems
from detr_ray.engine.run_report.report import Reported, first_batch, run_report
from detr_ray.engine.run_report.run_data import RunData
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.runtime.launch import run_job
from detr_ray.tracking import MemoryTracker
from detr_ray.tracking.event_log import EventLog
from detr_ray.tracking.history import RunHistory, Session
from detr_ray.viz.figure import figure_bytes


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
    written = Path(trained.job.run.path) / "report.html"
    assert str(written) in said[0] and tracker.files[-1] == (str(written), "")

    content = written.read_text()
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
    metrics = evaluate_detections(past.best.truth, past.best.detections)  # type: ignore[union-attr]
    summary = metrics.summary
    absent = [name for name, ap in metrics.category_ap.items() if ap is None]
    listed = page.text.partition("category AP AP50 ")[2].partition("No box in the validation set")[0]
    assert absent and f"and so no AP: {len(absent)} " in page.text
    assert listed and not [name for name in absent if name in listed]
    for expected in (
        "Run mine", "It finished", f"{summary['AP']:.3f}", "8 steps, 2.00 of 2 epochs", "optim.lr 0.001", "rectangle",
        "training images 16", "9.9<b>", f"eval.checkpoint={trained.job.run.path}", "costs",
    ):  # fmt: skip
        assert expected in page.text, expected


def without_records(past: PastRun) -> PastRun:
    return dataclasses.replace(past, history=None, best=None)


def commands_of(page: Page) -> list[list[str]]:
    """The arguments of each command on a page."""
    lines = [line for text in page.texts for line in text.splitlines() if line.startswith("python -m detr_ray.")]
    return [shlex.split(line)[2:] for line in lines]


def bare_page(path: str) -> Page:
    """The report of a run without what takes time: pictures."""
    return Page(run_report(without_records(open_past_run(path))).html)


def test_the_commands_of_a_report_are_understood(past: PastRun) -> None:
    commands = [command for command in commands_of(bare_page(past.directory.path)) if "..." not in command]
    names = [command[0].removeprefix("detr_ray.") for command in commands]
    assert names == ["train", "evaluate", "show", "show"]
    for name, (_, *arguments) in zip(names, commands, strict=True):
        assert importlib.import_module(f"detr_ray.{name}").main([*arguments, "--print-config"]) == 0, arguments
    _, flag, file, *overrides = commands[0]
    again = prepare_job(load_config(file, overrides), lambda line: None).run
    assert (flag, again.path, again.run_id) == ("--config", past.directory.path, past.directory.run_id)


def test_a_run_that_goes_on_is_shown_as_it_goes_on(trained: Observed, tmp_path: Path) -> None:
    """In another place, with keys that may change, and without the file of its first weights, which is not needed."""
    shutil.copytree(trained.job.run.path, tmp_path / "mine")
    record = json.loads((tmp_path / "mine" / "run.json").read_text())
    record["config"]["model.init_from"] = "first.pth"
    (tmp_path / "mine" / "run.json").write_text(json.dumps(record))
    moved = f"run.storage={tmp_path}"
    assert moved in commands_of(bare_page(str(tmp_path / "mine")))[0]

    assert trained.job.config.data.root is not None
    keys = ("run.name=mine", "train.epochs=2", "optim.lr=1e-3", "eval.size=40", "train.keep_last=7")
    job = prepare_job(small_config(Path(trained.job.config.data.root), tmp_path, *keys), lambda line: None)
    with job.run.locked(), pytest.raises(ConfigError, match="is being written by"):
        run_job(job)
    assert open_past_run(job.run.path).config.eval.size == 48, "what is refused changes nothing"
    assert run_job(job).status == "nothing to do"
    again = open_past_run(job.run.path)
    assert (again.config.eval.size, again.config.train.keep_last) == (40, 7)
    assert again.config.model.init_from == "first.pth", "what it was begun with"
    before = without_records(open_past_run(trained.job.run.path))
    assert "at the same size" in Page(comparison_report(before, without_records(again))).text, "its scores still are"
    unscored = dataclasses.replace(without_records(again), checkpoints=[])
    assert "other image sizes: (48, 96) and (40, 96)" in Page(comparison_report(before, unscored)).text
    assert moved not in commands_of(bare_page(job.run.path))[0]
    assert json.loads((tmp_path / "mine" / "run.json").read_text()) == record, "what a start is compared with stays"


def test_the_report_command_writes_what_the_end_of_the_training_wrote(trained: Observed, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    shutil.copytree(trained.job.run.path, run, ignore=shutil.ignore_patterns("report.html", "pictures"))
    assert report.main([str(run)]) == 0
    page = Page((run / "report.html").read_text())
    contents = [base64.b64decode(address.partition(",")[2]) for address in page.addresses if "base64" in address]
    files = {path.name: path.read_bytes() for path in (run / "pictures").iterdir()}
    assert {"batch.jpg", "worst.jpg", "training.svg"} <= files.keys() and sorted(files.values()) == sorted(contents)
    assert files["batch.jpg"] == figure_bytes(first_batch(trained.job.data), "jpg", dpi=100)


def test_images_are_pictured_where_they_are_the_runs(trained: Observed, past: PastRun, tmp_path: Path) -> None:
    said: list[str] = []
    here = RunData(past, DataConfig(), said.append)
    val, planned = here.validation_set(), here.training_data()
    assert val is not None and planned is not None and val.fingerprint == past.record["fingerprints"]["val"]
    assert planned.label_map == trained.job.data.label_map
    assert planned.plan(1, 0).step(0) == trained.job.data.plan(1, 0).step(0) and said == []

    other = make_dataset(tmp_path / "other", num_train=3, num_val=2)
    elsewhere = RunData(past, DataConfig(root=str(other)), said.append)
    assert elsewhere.validation_set() is elsewhere.training_data() is None
    assert all("is not what the run had" in line for line in said) and len(said) == 2
    only_val = RunData(past, DataConfig(val=trained_val(trained)), said.append)
    assert only_val.validation_set() is not None and only_val.training_data() is None
    assert "without the first batch: data.train: no training data is given" in said[2]

    drawn = GenerateConfig(num_train=100_000)
    gone = past.config.data.model_copy(update={"root": str(tmp_path / "gone"), "generate": drawn})
    changed = dataclasses.replace(past, config=past.config.model_copy(update={"data": gone}))
    assert RunData(changed, DataConfig(), said.append).validation_set() is None
    assert "generated images are not in" in said[3] and not (tmp_path / "gone").exists(), (
        "nothing is drawn for a report"
    )


def trained_val(trained: Observed) -> SplitConfig:
    root = trained.job.config.data.root
    return SplitConfig(annotations=f"{root}/annotations/instances_val2017.json", images=f"{root}/val2017")


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


def test_two_runs_side_by_side(past: PastRun) -> None:
    changed = past.config.model_copy(update={"train": past.config.train.model_copy(update={"epochs": 77})})
    other = dataclasses.replace(past, config=changed, directory=dataclasses.replace(past.directory, name="other"))
    html = comparison_report(past, other)
    assert '<table class="long"><thead><tr><th>key' in html, "all three columns are seen on a phone"
    page = Page(html)
    assert "train.epochs 2 77" in page.text and "+0.000" in page.text and "on the same images" in page.text
    elsewhere = {**past.record, "fingerprints": {"train": "a", "val": "b"}}
    moved, bare = dataclasses.replace(other, record=elsewhere, history=None, best=None), without_records(past)
    assert "say little about each other" in Page(comparison_report(bare, moved)).text


def problems_of(past: PastRun, **metrics: list[float]) -> str:
    logged = {name: (np.arange(1, len(values) + 1), np.array(values)) for name, values in metrics.items()}
    history = RunHistory(logged, {"run.failed": "no <b> image"}, [Session(0, 1, "FAILED")])
    return "; ".join(what for what, _ in find_problems(dataclasses.replace(past, history=history), None, None))


def test_what_looks_wrong(past: PastRun) -> None:
    assert "The run failed: no <b> image;" in problems_of(past, **{"val/AP": [0.1]}) + ";"
    assert "ended before its first validation" in problems_of(past)
    assert "no scores" in problems_of(past, **{"val/seconds": [2.0]}), "there was a validation, of images without boxes"
    without = {**past.record, "fingerprints": {"train": past.record["fingerprints"]["train"]}}
    assert "no validation" in problems_of(dataclasses.replace(past, record=without))
    assert "AP is 0;" in problems_of(past, **{"val/AP": [0.0, 0.0]}) + ";"
    assert "AP is 0.002" in problems_of(past, **{"val/AP": [0.0, 0.002]})
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
    (tmp_path / "several" / "first").mkdir(parents=True)
    shutil.copy(tmp_path / "run.json", tmp_path / "several" / "first")
    with pytest.raises(ConfigError, match=r"it has no run\.json; name one of those in it: first$"):
        open_past_run(str(tmp_path / "several"))


def test_only_whole_trainings_of_their_own_get_one_and_a_failure_is_a_warning(trained: Observed) -> None:
    job, tracker, said = trained.job, MemoryTracker(), []
    assert trained.result is not None
    trial = dataclasses.replace(job, gets_report=False)
    for other in ((trial, trained.result), (job, dataclasses.replace(trained.result, status="stopped"))):
        at_end.report_at_end(*other, tracker, said.append)
    at_end.say_how_to_report(trial, said.append)
    assert tracker.files == [] and said == []

    record = Path(job.run.path) / "run.json"
    record.rename(record.with_name("away"))
    try:
        at_end.report_at_end(job, trained.result, tracker, said.append)
    finally:
        record.with_name("away").rename(record)
    assert said[0].startswith("WARNING: the report could not be written") and "detr_ray.report" in said[0]
    assert tracker.files == []


def test_a_training_that_is_stopped_or_fails_says_how_to_get_a_report(
    trained: Observed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[MemoryTracker] = []
    monkeypatch.setattr(recorded_training, "open_tracker", lambda job: records.append(MemoryTracker()) or records[-1])
    assert trained.job.config.data.root is not None
    root = Path(trained.job.config.data.root)
    keys = ("tracking.report=true", *without_validation(root))
    stopped = prepare_job(small_config(root, tmp_path, *keys, "run.name=stopped"), lambda line: None)
    fails = prepare_job(small_config(root, tmp_path, *keys, "run.name=fails", "optim.lr=1e18"), lambda line: None)
    said: list[str] = []
    assert run_job(stopped, JobHooks(should_stop=lambda: True), said.append).status == "stopped"
    command = f"`python -m detr_ray.report {tmp_path}/stopped`"
    assert said[-1] == f"report            {command} writes one of what there is so far"
    with pytest.raises(RunFailed, match="not finite"):
        run_job(fails, say=said.append)
    assert f"`python -m detr_ray.report {tmp_path}/fails`" in said[-1]
    assert [record.status for record in records] == ["KILLED", "FAILED"]
    assert records[0].tags == {} and "not finite" in records[1].tags["run.failed"]
    assert list(tmp_path.glob("*/report.html")) == []
