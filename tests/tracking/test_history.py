"""A run's metrics, tags and times are read back from its log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from detr_ray.tracking.event_log import EventLog
from detr_ray.tracking.history import read_history


def test_what_two_processes_logged_is_one_history(tmp_path: Path) -> None:
    """The second begins again at step 2: the first value stays. A line that was cut short is passed over."""
    lines = [
        {"t": 1000, "kind": "start"},
        {"t": 1500, "kind": "tags", "tags": {"a": "old", "b": "1"}},
        {"t": 2000, "kind": "metrics", "step": 1, "metrics": {"train/loss": 3.0}},
        {"t": 4000, "kind": "metrics", "step": 2, "metrics": {"train/loss": "nan", "val/AP": 0.1}},
        {"t": 9000, "kind": "start"},
        {"t": 9500, "kind": "tags", "tags": {"a": "new"}},
        {"t": 10000, "kind": "metrics", "step": 2, "metrics": {"train/loss": 7.0}},
        {"t": 11000, "kind": "metrics", "step": 3, "metrics": {"train/loss": 1.0}},
        {"t": 12000, "kind": "finish", "status": "FINISHED"},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "events.jsonl").write_text(content.replace('"b"', '"b') + '{"t": 13000, "kind": "met')
    history = read_history(tmp_path)
    assert history is not None
    steps, values = history.metrics["train/loss"]
    assert steps.tolist() == [1, 2, 3] and np.array_equal(values, [3.0, np.nan, 1.0], equal_nan=True)
    assert history.metrics["val/AP"][1].tolist() == [0.1]
    assert history.tags == {"a": "new"}, "the line with the other tag cannot be read"
    assert [(one.began_ms, one.ended_ms, one.status) for one in history.sessions] == [
        (1000, 4000, None), (9000, 12000, "FINISHED"),
    ]  # fmt: skip
    assert history.seconds == 6.0


def test_what_a_log_writes_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append("metrics", step=4, metrics={"val/AP": 0.25})
    log.close()
    history = read_history(tmp_path)
    assert history is not None and history.metrics["val/AP"][0].tolist() == [4] and len(history.sessions) == 1


def test_a_run_that_logged_nothing_here_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None and read_history(tmp_path / "absent") is None
