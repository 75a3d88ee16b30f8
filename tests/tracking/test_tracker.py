"""The trackers that need nothing, and what every tracker refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detr_ray.tracking import MemoryTracker, NullTracker, Tracker


def use(tracker: Tracker) -> None:
    tracker.log_params({"optim.lr": 1e-4, "run.name": None})
    tracker.log_params({"optim.lr": 2e-4})
    tracker.log_metrics({"train/loss": torch.tensor(2.5), "val/AP": np.float32(0.5)}, step=3)
    tracker.log_metrics({"train/loss": math.nan}, step=4)
    tracker.log_text("model: {}", "config.yaml")
    tracker.log_file("here/best.pt", "checkpoints/best")
    tracker.set_tags({"git": "abc"})
    tracker.finish("FAILED")
    tracker.finish("FINISHED")


def test_memory_tracker_remembers() -> None:
    tracker = MemoryTracker()
    use(tracker)
    assert tracker.params == {"optim.lr": 1e-4, "run.name": None}
    assert tracker.history("val/AP") == [(3, 0.5)]
    assert tracker.history("train/loss")[0] == (3, 2.5)
    assert math.isnan(tracker.history("train/loss")[1][1])
    assert tracker.texts == {"config.yaml": "model: {}"}
    assert tracker.files == [("here/best.pt", "checkpoints/best")]
    assert tracker.tags == {"git": "abc"}
    assert tracker.status == "FAILED"


def test_null_tracker_takes_the_same_calls() -> None:
    use(NullTracker())


def test_a_metric_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="metric 'val/AP' must be a number, got 'high'"):
        MemoryTracker().log_metrics({"val/AP": "high"}, step=0)  # type: ignore[dict-item]


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "a\\b"])
def test_artifacts_stay_inside_the_run(path: str) -> None:
    with pytest.raises(ValueError, match="artifact path"):
        MemoryTracker().log_text("", path)
    with pytest.raises(ValueError, match="artifact path"):
        MemoryTracker().log_file("x", path)
