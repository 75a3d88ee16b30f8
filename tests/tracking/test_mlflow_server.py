"""Runs against a real MLflow server that is not there yet, is killed, comes back, and hangs.

One server process (with a worker of its own) is started twice; each start takes 5 to 10 seconds.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow_reading import QUICK, client_of, history, the_only_run, wait_until
from ports import free_port
from test_one_point_a_step import kill_and_resume
from versions import QUICK as VERSION_TURNS
from versions import stored

from detr_ray import send
from detr_ray.tracking import ChildState, MlflowTracker, SearchRun
from detr_ray.tracking.champion import decide
from detr_ray.tracking.fetching import fetched, read_record
from detr_ray.tracking.registry import ModelRegistry, RegistryError, RegistryUnavailable

START_LIMIT_S = 60.0


class Server:
    """An MLflow server on a fixed port, whose database and artifacts outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                said = (self.folder / "server.log").read_text()
                assert self.process is not None and self.process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers, which are a session of their own."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait(timeout=10)
            self.process = None


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    shutil.copy(empty_database, tmp_path / "server" / "mlflow.db")
    server = Server(tmp_path / "server")
    yield server
    server.kill()


@pytest.mark.timeout(180)
def test_everything_arrives_once_in_one_run_whatever_happens_to_the_server(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_tracker(finish: float) -> MlflowTracker:
        timing = replace(QUICK, finish=finish)
        return MlflowTracker(tmp_path / "run", uri=server.uri, experiment="detr", run_name="seven", timing=timing)

    def open_search(finish: float) -> SearchRun:
        timing = replace(QUICK, finish=finish)
        return SearchRun(
            tmp_path / "search", uri=server.uri, experiment="searches", name="rates", uid="search-1", timing=timing
        )

    def told(what: str) -> int:
        return sum(what in record.getMessage() for record in caplog.records)

    def log(tracker: MlflowTracker, first: int, last: int) -> None:
        for step in range(first, last):
            tracker.log_metrics({"train/loss": step, "train/loss_nan": math.nan}, step=step)

    # Not there at the start: logging goes on at its usual pace, and the missing server is mentioned once.
    first = open_tracker(finish=1.0)
    first.log_params({"optim.lr": 0.1})
    first.log_text("model: {}", "config.yaml")
    started = time.monotonic()
    log(first, 0, 50)
    assert time.monotonic() - started < 5
    server.start()
    server.wait_until_up()
    wait_until(lambda: not first.pending())
    assert told("does not accept records (ConnectionRefusedError: ") == 1
    wait_until(lambda: told("accepts records again"))

    assert len(caplog.records) == 2, "nothing else is said"

    # Killed in the middle, while events flow; the run ends before it is back.
    log(first, 50, 75)
    server.kill()
    log(first, 75, 100)
    started = time.monotonic()
    first.finish("FAILED")
    assert time.monotonic() - started < 10, "the end waits for a limited time only"
    assert told(f"events and 0 files are not in MLflow yet; `python -m detr_ray.send --run {tmp_path}/run`") == 1

    # The resumed run brings what was left, its own, and files.
    second = open_tracker(finish=60.0)
    log(second, 100, 150)
    checkpoint = tmp_path / "step_150"
    checkpoint.mkdir()
    (checkpoint / "model.pt").write_bytes(b"weights" * 100_000)
    second.log_file(checkpoint, "checkpoints/best")
    server.start()
    server.wait_until_up()
    second.finish("FINISHED")
    assert not second.pending()
    assert not second.pending().left_out

    run = the_only_run(server.uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "seven")
    assert history(server.uri, run.info.run_id, "train/loss") == [(step, float(step)) for step in range(150)]
    assert len(history(server.uri, run.info.run_id, "train/loss_nan")) == 150
    assert math.isnan(run.data.metrics["train/loss_nan"])
    assert run.data.params == {"optim.lr": "0.1"}
    assert [found.path for found in client_of(server.uri).list_artifacts(run.info.run_id)] == [
        "checkpoints",
        "config.yaml",
    ]
    (stored,) = client_of(server.uri).list_artifacts(run.info.run_id, "checkpoints/best")
    assert (stored.path, stored.file_size) == ("checkpoints/best/model.pt", 700_000)

    # A search, whose child died before it could say so.
    client = client_of(server.uri)
    search = open_search(finish=30.0)
    parent = search.wait_for_run_id(30)
    place = client.get_run(parent).info.experiment_id
    child = client.create_run(place, tags={"detr_ray.run_uid": "uid-t000"}).info.run_id
    children = [
        ChildState("t000", "failed", "uid-t000", "killed", {"optim.lr": 1e-4}, is_best=True),
        ChildState("t001", "refused", None, "optim.lr is too large", {"optim.lr": 1.0}),
    ]
    search.log_bytes(b"\x89PNG", "history.png")
    assert search.close("FINISHED", children)
    died = client.get_run(child)
    assert (died.info.status, died.data.tags["mlflow.parentRunId"]) == ("FAILED", parent)
    shown = client.search_runs([place], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.data.tags["trial.state"] for run in shown} == {"failed", "refused"}
    assert [found.path for found in client.list_artifacts(parent)] == ["history.png"]
    resumed = open_search(finish=1.0)
    wait_until(lambda: client.get_run(parent).info.status == "RUNNING")

    # A server that takes connections and does not answer: the end still comes in time.
    third = open_tracker(finish=1.0)
    wait_until(lambda: not third.pending())
    server.signal(signal.SIGSTOP)
    log(third, 150, 160)
    started = time.monotonic()
    third.finish("KILLED")
    assert time.monotonic() - started < 10
    assert third.pending().events == 11
    started = time.monotonic()
    assert not resumed.close("KILLED", children)
    assert time.monotonic() - started < 10
    assert send.main(["--run", str(tmp_path / "run"), "--timeout", "1"]) == 1
    assert "does not answer (timed out)" in capsys.readouterr().out
    server.signal(signal.SIGCONT)
    assert send.main(["--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{server.uri} answers; sending what is in {tmp_path}/run",
        "everything that was logged is in MLflow",
    ]
    assert the_only_run(server.uri).info.status == "KILLED", "and the command is the one that a warning named"
    assert history(server.uri, run.info.run_id, "train/loss") == [(step, float(step)) for step in range(160)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_leave_one_point_a_step_on_a_server(server: Server, tmp_path: Path) -> None:
    server.start()
    server.wait_until_up()
    kill_and_resume(tmp_path / "run", server.uri, kills=6, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_versions_and_their_champion_on_a_server(server: Server, tmp_path: Path) -> None:
    server.start()
    server.wait_until_up()
    tracker = MlflowTracker(tmp_path / "run", uri=server.uri, experiment="detr", run_name="seven", run_uid="uid-7")
    tracker.finish("FINISHED")
    registry = ModelRegistry(server.uri, "detr")
    assert registry.versions() == []
    with (
        pytest.raises(RegistryError, match="there is no version @champion"),
        fetched("models:/detr@champion", server.uri),
    ):
        pass
    for number, ap in ((1, 0.25), (2, 0.5), (3, 0.375)):
        made = stored(registry, tmp_path / str(number), f"weights {number}", ap, run_uid="uid-7")
        assert made.run_id == tracker.run_id
        decide(registry, made, 0.0, lambda champion: 0.0, print, VERSION_TURNS)
    champion = registry.champion()
    assert champion is not None and champion.version == 2
    for source, content in (
        ("models:/detr@champion", "weights 2"),
        ("models:/detr/1", "weights 1"),
        (f"runs:/{tracker.run_id}", "weights 3"),
    ):
        with fetched(source, server.uri) as folder:
            assert Path(folder, "weights.safetensors").read_text() == content
        assert not Path(folder).exists(), "a copy"
    assert b"optim" in read_record(registry, champion)
    assert registry.rollback().version == 1 and registry.compare(1, 2).same_data
    shutil.rmtree(server.folder / "artifacts")
    with (
        pytest.raises(RegistryError, match="the files of version 1 of detr are gone"),
        fetched("models:/detr/1", server.uri),
    ):
        pass
    server.kill()
    with pytest.raises(RegistryUnavailable, match="does not answer"):
        ModelRegistry(server.uri, "detr")
