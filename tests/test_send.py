"""The command that sends what a tracking store did not take; ``tracking/test_mlflow_server.py`` has a real server."""

from __future__ import annotations

from pathlib import Path

import mlflow  # noqa: F401 - not first in the sender's thread: pytest goes through all modules meanwhile
import pytest
from ports import free_port

from detr_ray import send
from detr_ray.engine.checkpoints.run_directory import open_run
from detr_ray.tracking import MlflowTracker, Timing

CANARY = "canary7"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where no server is."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"127.0.0.1:{free_port()}"


def make_run(storage: Path, uri: str) -> Path:
    """A run with records that no server has."""
    run = open_run("mine", str(storage), {}, {}, "")
    folder = storage / "mine" / "tracking"
    tracker = MlflowTracker(
        folder, uri=uri, experiment="detr", run_name="mine", run_uid=run.run_id, timing=Timing(finish=0.1)
    )
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    tracker.finish("FINISHED")
    return folder


@pytest.mark.timeout(120)
def test_what_cannot_be_sent_stays_and_the_exit_code_says_so(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "my runs", f"http://me:{CANARY}@{address}")
    # The password is not kept; the environment has it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@{address}")
    for named in (["run.name=mine", f"run.storage={tmp_path}/my runs"], ["--run", str(tmp_path / "my runs" / "mine")]):
        assert send.main([*named, "--timeout", "0.5"]) == 1
        shown = capsys.readouterr()
        assert f"http://{address} does not answer" in shown.out and CANARY not in shown.out + shown.err
    assert len((folder / "events.jsonl").read_text().splitlines()) == 3, "and nothing is lost"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run.name: is missing"),
        (["run.name=other"], "run.name: there is no run 'other' in"),
        (["--run", "."], "holds no records of a run"),
        (["run.name=mine", "tracking.uri=./mlruns"], "tracking.uri: ./mlruns is a folder to MLflow"),
        (["run.name=mine", "tracking.uri=localhost:5000"], "set tracking.uri to http://localhost:5000"),
        (["run.name=mine", f"tracking.uri=http://me:{CANARY}@host"], "tracking.uri: the address holds credentials"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", f"http://{address}")
    assert send.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and CANARY not in line
