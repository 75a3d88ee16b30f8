"""What the tracking tests share: an MLflow database made once, and trackers with short pauses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow_store
import pytest
from mlflow_reading import QUICK

from detr_ray.tracking import MlflowTracker


@pytest.fixture(scope="session")
def empty_database() -> Path:
    """An MLflow database without runs, to be copied."""
    return mlflow_store.empty_database()


@pytest.fixture
def store_uri(tmp_path: Path) -> str:
    """Address of an SQLite store of this test's own."""
    return mlflow_store.empty_store(tmp_path / "store")


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
