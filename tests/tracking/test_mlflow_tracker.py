"""Runs on a real MLflow store (SQLite): what arrives, once, in one run, whatever was in the way."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow_reading import QUICK, client_of, history, the_only_run, wait_until

from detr_ray.tracking import MlflowTracker, Timing, Tracker, default_tracking_uri, send_pending
from detr_ray.tracking.fetched_history import fetch_history

pytestmark = pytest.mark.timeout(60)

OpenTracker = Callable[..., MlflowTracker]

WHOLE_RUN = """
import sys
from detr_ray.tracking import MlflowTracker, Tracker, default_tracking_uri
assert "mlflow" not in sys.modules, "importing the package must not import mlflow"
tracker = MlflowTracker(sys.argv[1] + "/run", uri=default_tracking_uri(sys.argv[1]), experiment="detr", run_name="a")
tracker.log_metrics({"train/loss": 1.0}, step=0)
tracker.finish("FINISHED")
assert not tracker.pending()
"""

LOGS_UNTIL_KILLED = """
import sys, time
from detr_ray.tracking import MlflowTracker, Timing
tracker = MlflowTracker(sys.argv[1], uri=sys.argv[2], experiment="detr", run_name="killed",
                        timing=Timing(batch_interval=0.02))
for step in range(10**9):
    tracker.log_metrics({"train/loss": float(step)}, step=step)
    time.sleep(0.001)
    if step >= 100 and not step % 50 and tracker.run_id:
        print(step, flush=True)
"""


def artifact_names(uri: str, run_id: str, folder: str | None = None) -> set[str]:
    return {found.path for found in client_of(uri).list_artifacts(run_id, folder)}


def artifact_text(uri: str, run_id: str, path: str) -> str:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(run_id=run_id, artifact_path=path, tracking_uri=uri)).read_text()


def test_a_whole_run_arrives(open_tracker: OpenTracker, store_uri: str, tmp_path: Path) -> None:
    best = tmp_path / "step_7"
    (best / "inner").mkdir(parents=True)
    (best / "model.pt").write_text("weights")
    (best / "inner" / "more.txt").write_text("more")
    (tmp_path / "curve.png").write_text("picture")
    before = time.time_ns() // 1_000_000
    tracker: Tracker = open_tracker()
    tracker.log_params({"optim.lr": 1e-4, "run.name": None, "train.compile": False, "long": "x" * 600})
    tracker.log_params({f"many.{i}": i for i in range(250)})
    for step in (1, 2):
        tracker.log_metrics({f"val/AP/class {i}": i + step / 4 for i in range(1200)}, step=step)
    tracker.log_metrics({"train/loss": math.nan, "train/grad": math.inf}, step=3)
    tracker.log_text("first", "config.yaml")
    tracker.log_text("model:\n  hidden_dim: 256\n", "config.yaml")
    tracker.log_file(best, "checkpoints/best")
    tracker.log_file(tmp_path / "curve.png", "pictures")
    tracker.set_tags({"git.commit": "abc", "data": "coco"})
    tracker.finish("FINISHED")

    run = the_only_run(store_uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "seven")
    assert before <= run.info.start_time <= run.info.end_time
    params = run.data.params
    assert (params["optim.lr"], params["run.name"], params["train.compile"]) == ("0.0001", "None", "False")
    assert len(params["long"]) == 500
    assert params["long"].endswith("...")
    assert len(params) == 254
    assert history(store_uri, run.info.run_id, "val/AP/class 1199") == [(1, 1199.25), (2, 1199.5)]
    assert sum(name.startswith("val/AP/") for name in run.data.metrics) == 1200
    assert math.isnan(run.data.metrics["train/loss"])
    assert run.data.metrics["train/grad"] > 1e300
    assert run.data.tags["git.commit"] == "abc"
    assert artifact_text(store_uri, run.info.run_id, "config.yaml") == "model:\n  hidden_dim: 256\n"
    assert artifact_names(store_uri, run.info.run_id, "checkpoints/best") == {
        "checkpoints/best/model.pt",
        "checkpoints/best/inner",
    }
    assert artifact_text(store_uri, run.info.run_id, "pictures/curve.png") == "picture"
    experiment = client_of(store_uri).get_experiment_by_name("detr")
    assert experiment.artifact_location == (tmp_path / "store" / "mlartifacts").resolve().as_uri()

    fetched = fetch_history(store_uri, "detr", run.data.tags["detr_ray.run_uid"])
    assert fetched is not None and set(fetched.metrics) == {"train/loss", "train/grad"}
    steps, values = fetched.metrics["train/loss"]
    assert steps.tolist() == [3] and math.isnan(values[0]) and fetched.tags["data"] == "coco"
    assert [session.status for session in fetched.sessions] == ["FINISHED"] and 0 < fetched.seconds < 60
    assert fetch_history(store_uri, "detr", "another") is fetch_history(store_uri, "absent", "another") is None
    assert fetch_history(f"sqlite:///{tmp_path}/absent.db", "detr", "a") is None
    assert not (tmp_path / "absent.db").exists()


def test_metrics_carry_the_time_they_were_logged(open_tracker: OpenTracker, store_uri: str) -> None:
    tracker = open_tracker(timing=Timing(batch_interval=1.0))
    logged = time.time_ns() // 1_000_000
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    time.sleep(0.2)
    tracker.log_metrics({"train/loss": 2.0}, step=2)
    tracker.finish("FINISHED")
    first, second = client_of(store_uri).get_metric_history(tracker.run_id, "train/loss")
    assert 0 <= first.timestamp - logged < 150
    assert second.timestamp - first.timestamp >= 200


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(open_tracker: OpenTracker, store_uri: str) -> None:
    first = open_tracker()
    first.log_params({"optim.lr": 0.1, "train.epochs": 10})
    first.log_metrics({"train/loss": 1.0}, step=1)
    first.finish("FAILED")
    assert the_only_run(store_uri).info.status == "FAILED"

    second = open_tracker()
    assert second.run_uid == first.run_uid
    second.log_params({"optim.lr": 0.1, "train.epochs": 20, "train.compile": True})
    second.log_metrics({"train/loss": 0.5}, step=2)
    wait_until(lambda: not second.pending())
    assert the_only_run(store_uri).info.status == "RUNNING"
    at_work = fetch_history(store_uri, "detr", first.run_uid)
    (point,) = [p for p in client_of(store_uri).get_metric_history(second.run_id, "train/loss") if p.step == 2]
    assert at_work is not None and [(s.status, s.ended_ms) for s in at_work.sessions] == [(None, point.timestamp)]
    second.finish("FINISHED")

    run = the_only_run(store_uri)
    assert run.info.status == "FINISHED"
    assert history(store_uri, run.info.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert run.data.params == {"optim.lr": "0.1", "train.epochs": "10", "train.compile": "True"}
    assert {name: value for name, value in run.data.tags.items() if name.startswith("resume/")} == {
        "resume/train.epochs": "20"
    }


def test_a_run_resumed_from_another_folder_is_found_by_its_uid(open_tracker: OpenTracker, store_uri: str) -> None:
    for step, folder in enumerate(["machine-a", "machine-b"]):
        tracker = open_tracker(folder, run_uid="storage/run seven")
        tracker.log_metrics({"train/loss": step}, step=step)
        tracker.finish("FINISHED")
    assert history(store_uri, the_only_run(store_uri).info.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_another_run_cannot_use_the_folder(open_tracker: OpenTracker) -> None:
    open_tracker(run_uid="one").finish("FINISHED")
    with pytest.raises(ValueError, match="holds what run one logged"):
        open_tracker(run_uid="two")
    with pytest.raises(ValueError, match="run_uid must be"):
        open_tracker("other", run_uid="it's")


def test_sending_everything_again_changes_nothing(open_tracker: OpenTracker, store_uri: str, tmp_path: Path) -> None:
    tracker = open_tracker()
    tracker.log_params({"optim.lr": 0.1})
    for step in range(50):
        tracker.log_metrics({"train/loss": step, "bad": math.nan}, step=step)
    tracker.finish("FINISHED")
    (tmp_path / "run" / "sent.json").unlink()  # as if the sender had died before it noted anything

    assert not send_pending(tmp_path / "run", store_uri)
    run = the_only_run(store_uri)
    assert history(store_uri, run.info.run_id, "train/loss") == [(step, float(step)) for step in range(50)]
    assert len(history(store_uri, run.info.run_id, "bad")) == 50
    assert not [name for name in run.data.tags if name.startswith("resume/")]
    assert run.info.status == "FINISHED"


def test_what_a_killed_process_logged_is_sent_by_the_next(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LOGS_UNTIL_KILLED, str(tmp_path / "run"), store_uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            last = int(process.stdout.readline())
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    tracker = open_tracker()
    tracker.log_metrics({"train/loss": -1.0}, step=-1)
    tracker.finish("FINISHED")
    arrived = history(store_uri, the_only_run(store_uri).info.run_id, "train/loss")
    assert len(arrived) > last
    assert arrived == [(step, float(step)) for step in range(-1, len(arrived) - 1)]


def test_a_deleted_run_and_experiment_are_restored(
    open_tracker: OpenTracker, store_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker()
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    wait_until(lambda: not tracker.pending())
    client_of(store_uri).delete_run(tracker.run_id)
    tracker.log_metrics({"train/loss": 2.0}, step=2)
    wait_until(lambda: not tracker.pending())
    assert the_only_run(store_uri).info.lifecycle_stage == "active"
    assert "was deleted: restored" in caplog.text
    tracker.finish("FINISHED")

    client_of(store_uri).delete_experiment(the_only_run(store_uri).info.experiment_id)
    again = open_tracker()
    again.log_metrics({"train/loss": 3.0}, step=3)
    again.finish("FINISHED")
    run = the_only_run(store_uri)
    assert run.info.lifecycle_stage == "active"
    assert [step for step, _ in history(store_uri, run.info.run_id, "train/loss")] == [1, 2, 3]

    client_of(store_uri).delete_experiment(run.info.experiment_id)
    fresh = open_tracker("other-run")
    fresh.finish("FINISHED")
    assert client_of(store_uri).get_run(fresh.run_id).info.lifecycle_stage == "active"


def test_a_store_made_anew_gets_the_whole_run_again(
    open_tracker: OpenTracker, tmp_path: Path, empty_database: Path
) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
        (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    for step, folder in enumerate([first, second]):
        tracker = open_tracker(uri=default_tracking_uri(folder))
        tracker.log_metrics({"train/loss": step}, step=step)
        tracker.finish("FINISHED")
    run = the_only_run(default_tracking_uri(second))
    assert history(default_tracking_uri(second), run.info.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_names_that_mlflow_refuses_are_cleaned(open_tracker: OpenTracker, store_uri: str) -> None:
    tracker = open_tracker()
    tracker.log_metrics({"val/AP/cup (small)": 0.1, "val/AP/a+b": 0.2, "val/AP/a*b": 0.3}, step=1)
    tracker.log_params({"weird?": 1})
    tracker.set_tags({"weird!": "x"})
    tracker.finish("FINISHED")
    run = the_only_run(store_uri)
    assert run.data.metrics["val/AP/cup _small_"] == 0.1
    assert sorted(run.data.metrics.values()) == [0.1, 0.2, 0.3]
    assert run.data.params == {"weird_": "1"}
    assert run.data.tags["weird_"] == "x"
    assert not tracker.pending().left_out


def test_one_value_that_mlflow_refuses_does_not_hold_up_the_others(
    open_tracker: OpenTracker, store_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker()
    tracker.set_tags({f"tag{i}": str(i) for i in range(20)})
    for step in range(20):
        tracker.log_metrics({"good": step}, step=2**70 if step == 7 else step)  # no database holds that step
    tracker.log_metrics({"later": 1.0}, step=1)
    tracker.finish("FINISHED")
    run = the_only_run(store_uri)
    assert run.data.metrics["later"] == 1.0
    assert [step for step, _ in history(store_uri, run.info.run_id, "good")] == [i for i in range(20) if i != 7]
    assert tracker.pending().left_out["refused values"] >= 1
    assert "MLflow refuses metrics 'good'" in caplog.text


def test_files_that_are_gone_are_left_out_and_counted(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(timing=Timing(batch_interval=0.5))
    for name in ("pruned.pt", "kept.pt"):
        (tmp_path / name).write_text(name)
        tracker.log_file(tmp_path / name, "checkpoints")
    (tmp_path / "pruned.pt").unlink()
    tracker.finish("FINISHED")
    assert artifact_names(store_uri, tracker.run_id, "checkpoints") == {"checkpoints/kept.pt"}
    assert tracker.pending().left_out == {"files gone": 1}
    assert f"{tmp_path / 'pruned.pt'} is gone" in caplog.text


def test_only_the_last_of_what_goes_to_one_place_is_stored(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(timing=Timing(batch_interval=0.5))
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"step_{step}"
        checkpoint.mkdir()
        (checkpoint / "model.pt").write_text(f"step {step}")
        tracker.log_file(checkpoint, "checkpoints/best")
    for step in (1, 2):
        (tmp_path / f"step_{step}" / "model.pt").unlink()
        (tmp_path / f"step_{step}").rmdir()
    tracker.finish("FINISHED")
    assert artifact_text(store_uri, tracker.run_id, "checkpoints/best/model.pt") == "step 3"
    assert not tracker.pending().left_out
    assert not caplog.text


def test_artifacts_that_cannot_be_stored_do_not_hold_up_metrics(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "store" / "mlartifacts"
    in_the_way.write_text("a file where the folder of all artifacts should be")
    tracker = open_tracker()
    tracker.log_text("a", "config.yaml")
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    wait_until(lambda: tracker.pending().events == 0)
    tracker.log_metrics({"train/loss": 2.0}, step=2)
    started = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - started < QUICK.finish / 2, "what cannot be stored is not waited for"
    assert history(store_uri, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert tracker.pending().uploads == ("config.yaml",)
    assert "'config.yaml' could not be stored and will be tried again" in caplog.text
    assert "1 files are not in MLflow yet" in caplog.text

    in_the_way.unlink()
    assert not send_pending(tmp_path / "run")
    assert artifact_text(store_uri, tracker.run_id, "config.yaml") == "a"


def test_nothing_can_be_logged_after_the_end(open_tracker: OpenTracker) -> None:
    tracker = open_tracker()
    tracker.finish("FINISHED")
    tracker.finish("FAILED")
    with pytest.raises(RuntimeError, match=r"metrics.* after the tracker was finished"):
        tracker.log_metrics({"a": 1.0}, step=1)


def test_two_senders_of_one_folder_take_turns(
    open_tracker: OpenTracker, store_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker()
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    wait_until(lambda: not tracker.pending())
    other = open_tracker(timing=Timing(batch_interval=0.02, finish=0.3))
    other.log_metrics({"train/loss": 2.0}, step=2)
    other.finish("KILLED")
    assert "another process is sending" in caplog.text
    tracker.finish("FINISHED")
    run = the_only_run(store_uri)
    assert history(store_uri, run.info.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_send_pending_needs_a_folder_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tracked run"):
        send_pending(tmp_path)


def test_a_first_run_makes_its_database_and_prints_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WHOLE_RUN, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert the_only_run(default_tracking_uri(tmp_path)).info.status == "FINISHED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "run"]


def test_a_database_made_by_halves_never_appears(tmp_path: Path) -> None:
    from detr_ray.tracking.whole_files import create_database_whole

    made_by_halves = threading.Event()

    def make(draft: Path, die: bool) -> None:
        with closing(sqlite3.connect(draft)) as database:
            database.execute("create table half (x)")
            if die:
                made_by_halves.set()
                raise KeyboardInterrupt
            database.execute("create table whole (x)")
            database.commit()

    path = tmp_path / "deep" / "store.db"
    with pytest.raises(KeyboardInterrupt):
        create_database_whole(path, lambda draft: make(draft, die=True))
    assert made_by_halves.is_set()
    assert not path.exists()
    create_database_whole(path, lambda draft: make(draft, die=False))
    create_database_whole(path, lambda draft: pytest.fail("it is there already"))
    with closing(sqlite3.connect(path)) as database:
        assert len(database.execute("select name from sqlite_master").fetchall()) == 2
    assert list(path.parent.iterdir()) == [path]
