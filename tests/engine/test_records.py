"""Where records of runs in buckets lie on a machine, and which tracking stores training refuses."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.engine.job import prepare_job
from detr_ray.engine.preflight.checks import run_preflight
from detr_ray.engine.reporting.tracking_store import local_storage, run_tracking_uri
from detr_ray.tracking import MemoryTracker


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_each_user_has_a_folder_for_runs_in_buckets(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(temporary, "s3://bucket/runs")  # type: ignore[arg-type]
    mine = local_storage(config)
    assert mine == temporary / f"detr_ray-records-{os.getuid()}"
    assert run_tracking_uri(config) == f"sqlite:///{mine}/mlflow.db"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert local_storage(config) == temporary / "detr_ray-records-12345"
    assert list(temporary.iterdir()) == [], "asking makes nothing"


@pytest.mark.parametrize("kind", ["link", "file", "written by all", "another's"])
def test_a_folder_that_others_can_write_is_refused(temporary: Path, kind: str) -> None:
    folder = temporary / f"detr_ray-records-{os.getuid()}"
    if kind == "link":
        (temporary / "theirs").mkdir()
        folder.symlink_to(temporary / "theirs")
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
    if kind == "written by all":
        folder.chmod(0o777)
    if kind == "another's":
        if os.getuid() != 0:
            pytest.skip("only root gives folders away")
        os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match=f"{folder} is a link, or not only this user's.*set TMPDIR"):
        local_storage(tiny_config(temporary, "s3://bucket/runs"))  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["./mlruns", "databricks", "localhost:5000", "a folder", "http://localhost:99999"])
def test_training_refuses_what_check_finds_in_the_same_words(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = f"sqlite:///{tmp_path}" if uri == "a folder" else uri
    data = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    config = tiny_config(data, tmp_path / "runs", "tracking.enabled=true", f"tracking.uri={uri}")
    report = run_preflight(config, lambda line: None)
    (finding,) = [finding for finding in report.findings if finding.area == "tracking"]
    assert finding.level == "error"
    with pytest.raises(ConfigError) as refused:
        prepare_job(config, lambda line: None)
    (line,) = refused.value.errors
    assert finding.message in line and line.startswith("tracking.uri: ")
    assert not (tmp_path / "runs").exists(), "no run is begun"


def test_training_goes_on_without_a_server_that_is_away(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    config = tiny_config(data, tmp_path / "runs", "tracking.enabled=true", "tracking.uri=http://127.0.0.1:1")
    report = run_preflight(config, lambda line: None)
    (finding,) = [finding for finding in report.findings if finding.area == "tracking"]
    said: list[str] = []
    prepare_job(config, said.append)
    assert [line for line in said if line.startswith(f"WARNING: {finding.message}; training goes on")], said


class Diary(MemoryTracker):
    """Notes what was last logged when it is synced, and which checkpoints there were then."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.synced: list[tuple[int, list[str]]] = []

    def sync(self) -> None:
        self.synced.append((self.metrics[-1][0], sorted(path.name[-2:] for path in self.checkpoints.glob("step_*"))))


def test_records_are_synced_before_each_checkpoint_is_written(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", num_train=32, num_val=2)
    keys = ("run.name=mine", "train.epochs=1", "train.checkpoint_every_steps=2", "train.keep_last=9")
    tracker = Diary(tmp_path / "runs" / "mine" / "checkpoints")
    fit_here(tiny_config(data, tmp_path / "runs", *keys), tracker)
    assert tracker.synced == [(2, []), (4, ["02"])]
    checkpoint = tracker.checkpoints / "step_00000004"
    assert sorted(tracker.files) == [
        (str(checkpoint / "model.pt"), "checkpoints/best"),
        (str(checkpoint / "model.pt"), "checkpoints/last"),
        (str(checkpoint / "scores.json"), "checkpoints/best"),
    ]
