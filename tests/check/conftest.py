"""Runs the check command on a small model, in this process; none of its tests starts Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from check_outcome import SMALL, Outcome

from detr_ray.check import main
from detr_ray.engine.preflight import training


@pytest.fixture(autouse=True)
def no_tracking_in_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def no_estimate_of_memory(monkeypatch):
    """It takes half a second each time; its own tests are in ``engine/test_memory_estimate.py``."""
    monkeypatch.setattr(training, "check_memory", lambda *arguments: None)


@pytest.fixture
def check(tmp_path, capsys):
    """Runs the command on a small model, with the keys given, and reads its report back."""

    def run(root: Path | None, *argv: str) -> Outcome:
        report = tmp_path / "report" / "report.json"
        data = [] if root is None else [f"data.root={root}"]
        code = main([*SMALL, *data, f"run.storage={tmp_path}/runs", *argv, "--json", str(report)])
        return Outcome(code, capsys.readouterr().out, json.loads(report.read_text()))

    return run
