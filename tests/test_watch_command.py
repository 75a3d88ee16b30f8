"""Looking at a run from outside: the file that it keeps, what is said of it, and the bar in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from observing import small_config, without_validation
from terminal import COLOUR, terminal
from tiny import make_dataset

from detr_ray import evaluate, train, tune, watch
from detr_ray.config import Config, ConfigError
from detr_ray.engine.reporting.watching import GONE_S, RESTART_S, SILENT_S, Follower, overview
from detr_ray.progress_bar import ProgressBar
from detr_ray.runtime.launch import fit
from detr_ray.tracking import MemoryTracker
from detr_ray.tracking import run_progress as run_progress_module
from detr_ray.tracking.run_progress import PROGRESS_FILE, ProgressTracker, RunProgress, read_progress

STEP = {
    "train/loss": 4.5, "train/loss_ce": 0.5, "train/loss_bbox": 0.0625, "train/loss_giou": 0.25, "optim/lr": 1e-4,
    "perf/step_s": 0.5, "perf/images_per_s": 32.0, "perf/data_wait_frac": 0.03, "train/skipped_steps": 0.0,
    "train/bad_images": 0.0,
}  # fmt: skip
BEGUN = RunProgress("mine", total_steps=100, steps_per_epoch=25)


def scores(ap: float) -> dict[str, float]:
    return {"val/AP": ap, "val/AP50": ap, "val/AP75": ap, "val/AR100": ap, "val/seconds": 2.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two epochs of four steps without records in MLflow, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("watched")
    data = make_dataset(folder / "shapes", num_train=16, num_val=4)
    lines: list[str] = []
    result = fit(small_config(data, folder / "runs", "run.name=mine", "train.epochs=2", "optim.lr=1e-2"), lines.append)
    return Path(result.run_path), lines


def watched(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = watch.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


# The file


def test_a_run_keeps_its_progress_and_what_is_said_of_it_are_its_own_lines(trained: tuple[Path, list[str]]) -> None:
    path, lines = trained
    progress = read_progress(str(path))
    assert progress is not None
    assert (progress.status, progress.step, progress.total_steps, progress.steps_per_epoch) == ("finished", 8, 8, 4)
    assert list(progress.evaluations) == [4, 8]
    assert not [name for numbers in progress.evaluations.values() for name in numbers if name.count("/") > 1]
    said = overview(progress, time.time())
    assert said[:2] == [line for line in lines if " evaluated in " in line]
    assert said[2] == [line for line in lines if " step " in line and "loss" in line][-1]
    best = max(numbers["val/AP"] for numbers in progress.evaluations.values())
    assert said[3].startswith("run mine: finished, step 8/8 (100%), epoch 2.00 of 2, best AP " + f"{best:.3f}")
    assert len(said) == 4


def test_all_records_are_passed_on_and_the_file_is_valid_json(tmp_path: Path) -> None:
    inner = MemoryTracker()
    tracker = ProgressTracker(inner, str(tmp_path), BEGUN)
    tracker.log_params({"a": 1})
    tracker.set_tags({"b": "c"})
    tracker.log_text("text", "place.txt")
    tracker.log_file(tmp_path / "x", "folder")
    tracker.log_metrics(STEP | {"train/loss_giou": math.nan}, 25)
    tracker.log_metrics(scores(0.5) | {"val/AP/cat": 0.5}, 25)
    tracker.sync()
    tracker.finish("FAILED")
    tracker.finish("FINISHED")
    assert (inner.params, inner.tags, inner.texts, inner.status) == (
        {"a": 1},
        {"b": "c"},
        {"place.txt": "text"},
        "FAILED",
    )
    assert inner.files == [(str(tmp_path / "x"), "folder")] and [step for step, _ in inner.metrics] == [25, 25]
    content = json.loads((tmp_path / PROGRESS_FILE).read_text(), parse_constant=pytest.fail)
    assert content["status"] == "failed" and content["metrics"]["train/loss_giou"] is None
    progress = read_progress(str(tmp_path))
    assert progress is not None and math.isnan(progress.metrics["train/loss_giou"])
    assert progress.metrics["train/loss"] == 4.5 and progress.step == 25
    assert progress.evaluations == {25: scores(0.5)}
    assert time.time() - 60 < progress.started <= progress.written <= time.time()


def test_a_run_that_goes_on_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    for step, ap in ((25, 0.25), (50, 0.5)):
        tracker = ProgressTracker(MemoryTracker(), str(tmp_path), BEGUN)
        if step == 25:
            tracker.log_metrics(STEP, 30)
        tracker.log_metrics(scores(ap), step)
        tracker.finish("KILLED")
    progress = read_progress(str(tmp_path))
    assert progress is not None and progress.status == "stopped"
    assert (progress.step, progress.metrics) == (30, STEP)
    assert progress.evaluations == {25: scores(0.25), 50: scores(0.5)}


def test_the_file_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """News soon, and without news a sign of life."""
    monkeypatch.setattr(run_progress_module, "BEAT_S", 0.05)
    monkeypatch.setattr(run_progress_module, "_EVERY_S", 0.01)
    tracker = ProgressTracker(MemoryTracker(), str(tmp_path), BEGUN)
    tracker.log_metrics(STEP, 7)
    first = waited_for(tmp_path, lambda progress: progress.step == 7)
    assert first.status == "running"
    waited_for(tmp_path, lambda progress: progress.written > first.written)
    tracker.finish("FINISHED")


def test_storage_that_fails_holds_nothing_up_and_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_progress_module, "_EVERY_S", 0.01)
    (tmp_path / PROGRESS_FILE).mkdir()
    tracker = ProgressTracker(MemoryTracker(), str(tmp_path), BEGUN)
    for step in range(5):
        tracker.log_metrics(STEP, step)
        time.sleep(0.02)
    tracker.finish("FINISHED")
    named = [
        record.message for record in caplog.records if PROGRESS_FILE in record.message and record.levelname == "WARNING"
    ]
    assert len(named) == 1, caplog.text


def waited_for(folder: Path, wanted) -> RunProgress:
    for _ in range(500):
        progress = read_progress(str(folder))
        if progress is not None and wanted(progress):
            return progress
        time.sleep(0.01)
    return pytest.fail("it is not written")


# What is said


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def follower() -> tuple[Follower, list[str], Clock]:
    lines: list[str] = []
    clock = Clock()
    return Follower(lines.append, clock), lines, clock


def at(step: int, written: float, **changes: object) -> RunProgress:
    return dataclasses.replace(BEGUN, step=step, metrics=STEP, written=written, **changes)


def test_only_what_is_new_is_said() -> None:
    follow, lines, _ = follower()
    assert not follow.see(dataclasses.replace(BEGUN, written=1.0))
    assert len(lines) == 1 and lines[0].startswith("run mine: running, step 0/100 (0%), epoch 0.00 of 4, running for ")
    lines.clear()
    follow.see(at(25, 2.0))
    follow.see(at(25, 3.0))
    assert [line[:24] for line in lines] == ["epoch   1.00  step 25/100"[:24]] and "left 38 s" in lines[0]
    lines.clear()
    follow.see(at(30, 4.0, evaluations={25: scores(0.25)}))
    follow.see(at(30, 5.0, evaluations={25: scores(0.25)}))
    assert ["step 30/100" in lines[0], "AP 0.250" in lines[1], len(lines)] == [True, True, 2]
    lines.clear()
    assert follow.see(at(100, 6.0, evaluations={25: scores(0.25), 100: scores(0.125)}, status="finished"))
    assert ["step 100/100" in lines[0], "(best so far)" not in lines[1], "finished" in lines[2]] == [True] * 3
    assert lines[2].endswith("best AP 0.250 after epoch 1")


def test_a_run_that_failed_may_begin_again() -> None:
    follow, lines, clock = follower()
    follow.see(at(25, 1.0))
    assert not follow.see(at(25, 2.0, status="failed"))
    clock.now = RESTART_S - 1
    assert not follow.see(at(25, 2.0, status="failed"))
    follow.see(at(26, 3.0, started=9.0))
    assert [word in line for word, line in zip(("failed", "step 26/100", "running"), lines[-3:], strict=True)] == [
        True
    ] * 3
    follow.see(at(26, 4.0, started=9.0, status="stopped"))
    clock.now += RESTART_S + 1
    assert follow.see(at(26, 4.0, started=9.0, status="stopped"))


def test_a_process_that_falls_silent_is_named_once_and_given_up() -> None:
    follow, lines, clock = follower()
    progress = at(25, time.time())
    follow.see(progress)
    lines.clear()
    for clock.now in (SILENT_S - 1, SILENT_S + 1, SILENT_S + 5):
        assert not follow.see(progress)
    assert len(lines) == 1 and lines[0].startswith("no sign of life for 1 min 31 s")
    progress = dataclasses.replace(progress, written=progress.written + 1)
    assert not follow.see(progress)
    clock.now += SILENT_S + 1
    assert not follow.see(progress) and len(lines) == 2, "it lived, and is silent again"
    clock.now += GONE_S
    assert follow.see(progress)


# The command


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for arguments, said in (
        ([tmp_path], "is no run's folder"),
        ([], "RUN is missing"),
        (["s3://key:secret@bucket/runs/a"], "holds credentials"),
    ):
        code, _, err = watched(*arguments)
        assert code == 2 and said in err and "secret@" not in err
    (tmp_path / "run.json").write_text("{}")
    assert "has taken no step yet" in watched(tmp_path, "--once")[2]
    (tmp_path / PROGRESS_FILE).write_text("[]")
    assert "progress.json is damaged" in watched(tmp_path)[2]


def test_a_run_is_followed_to_its_end_by_its_name_too(trained: tuple[Path, list[str]]) -> None:
    path, _ = trained
    code, out, err = watched("run.name=mine", f"run.storage={path.parent}")
    assert (code, err) == (0, "") and "run mine: finished" in out
    assert watched(path)[1] == out


def test_the_exit_code_says_whether_the_run_finished(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_ray.engine.reporting.watching.RESTART_S", 0.0)
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    progress = json.loads((run / PROGRESS_FILE).read_text())
    (run / PROGRESS_FILE).write_text(json.dumps(progress | {"status": "failed"}))
    assert watched(run)[0] == 1


# The bar


def argv_of(data: Path, storage: Path) -> list[str]:
    config = small_config(data, storage, "run.name=mine", "optim.lr=1e-3", *without_validation(data))
    file = storage.parent / "config.yaml"
    file.write_text(config.to_yaml())
    return ["--config", str(file)]


def test_a_terminal_shows_a_bar_and_a_pipe_the_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=16, num_val=4)
    with terminal(monkeypatch) as shown:
        assert train.main(argv_of(data, tmp_path / "a")) == 0
    drawn = b"".join(shown).decode()
    assert re.search(r"step [1-4]/4 [^\n]*━[^\n]*\d%[^\n]* left ", re.sub(COLOUR, "", drawn)), repr(drawn)
    assert drawn.rstrip().endswith(str(tmp_path / "a" / "mine")), "the bar is gone at the end"

    piped = io.StringIO()
    with contextlib.redirect_stdout(piped):
        assert train.main(argv_of(data, tmp_path / "b")) == 0
    assert "\x1b" in drawn and "\x1b" not in piped.getvalue() and "\r" not in piped.getvalue()
    plain = re.sub(rf"{COLOUR}|\r", "", drawn)
    for line in piped.getvalue().splitlines():
        words = re.sub(r"[0-9.e+-]+", "#", line.replace(str(tmp_path / "b"), ""))
        assert words in re.sub(r"[0-9.e+-]+", "#", plain.replace(str(tmp_path / "a"), "")), line


def test_an_evaluation_counts_images_and_a_search_trials(
    trained: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("train.launcher=local", "train.use_gpu=false", "eval.batch_size=1")
    with terminal(monkeypatch) as shown:
        assert evaluate.main([f"eval.checkpoint={trained[0]}", *keys]) == 0
    drawn = re.sub(COLOUR, "", b"".join(shown).decode())
    assert re.search(r"image [1-4]/4 [^\n]*━[^\n]*\d%[^\n]* left ", drawn), repr(drawn)

    def run_search(config: Config, say: Callable[[str], None], *, on_progress: Callable[[float], None], **more: object):
        on_progress(2.5)
        raise ConfigError("enough was seen")

    monkeypatch.setattr("detr_ray.runtime.search.search.run_search", run_search)
    space = "tune={trials: 5, space: {optim.lr: {uniform: [0, 1]}}}"
    with terminal(monkeypatch) as shown:
        assert tune.main(["data.root=/data", space]) == 2
    assert re.search(r"trial 2/5 [^\n]* 50%", re.sub(COLOUR, "", b"".join(shown).decode())), repr(shown)


def test_a_bar_begins_where_the_run_goes_on_and_lines_are_made_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown, ProgressBar("step") as bar:
        bar.begin(50)
        for step in (0, 20, 21, 0, 20):  # resumed; then the workers are started again
            bar.update(step)
            assert bar._bar is not None
            tasks = [(task.completed, task.total) for task in bar._bar.tasks]
            assert tasks == ([] if bar._done == 0 else [(bar._done, 50)])
        bar.say("a line with \x1b[1m in it")
    assert (bar._done, b"a line with \\x1b[1m in it" in b"".join(shown)) == (20, True)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        monkeypatch.setenv("TERM", "dumb")
        with ProgressBar("step") as bar:
            bar.begin(5)
            bar.update(3)
            bar.say("a line with \x1b[1m in it")
            sys.stdout.flush()
    assert b"".join(shown) == b"a line with \\x1b[1m in it\r\n"
