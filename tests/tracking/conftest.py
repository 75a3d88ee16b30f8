"""What the tracking tests share: an MLflow database made once, and trackers with short pauses."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_reading import QUICK, client_of

from detr_ray.tracking import MlflowTracker, Timing, default_tracking_uri


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it does not."""
    folder = tmp_path_factory.mktemp("empty-store")
    uri, timing = default_tracking_uri(folder), Timing(finish=240)
    tracker = MlflowTracker(folder / "run", uri=uri, experiment="first", run_name="first", timing=timing)
    tracker.finish("FINISHED")
    assert not tracker.pending()
    client_of(uri).delete_run(tracker.run_id)
    return folder / "mlflow.db"


@pytest.fixture
def store_uri(tmp_path: Path, empty_database: Path) -> str:
    """Address of an SQLite store of this test's own."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store" / "mlflow.db")
    return default_tracking_uri(tmp_path / "store")


@pytest.fixture
def open_tracker(tmp_path: Path, store_uri: str) -> Iterator[Callable[..., MlflowTracker]]:
    """Opens trackers with short pauses, and finishes those that the test left open."""
    opened: list[MlflowTracker] = []

    def open_(folder: str = "run", **changes: Any) -> MlflowTracker:
        settings = {"uri": store_uri, "experiment": "detr", "run_name": "seven", "timing": QUICK} | changes
        opened.append(MlflowTracker(tmp_path / folder, **settings))
        return opened[-1]

    yield open_
    for tracker in opened:
        tracker.finish("KILLED")


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="detr_ray")
