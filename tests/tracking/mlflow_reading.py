"""Looks at what arrived in an MLflow store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from detr_ray.tracking import Timing

QUICK = Timing(batch_interval=0.02, first_retry=0.05, longest_retry=0.2, finish=60.0)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def the_only_run(uri: str, experiment: str = "detr") -> Any:
    """The run of an experiment, which must be the only one, deleted ones included."""
    from mlflow.entities import ViewType

    client = client_of(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], run_view_type=ViewType.ALL)
    assert len(found) == 1, [run.data.tags for run in found]
    return found[0]


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in MLflow."""
    points = client_of(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def wait_until(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s"
        time.sleep(0.01)
