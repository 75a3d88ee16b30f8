"""What a run logged, read from an MLflow store: where its log lies on another machine."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from detr_ray.tracking.history import RunHistory, Session
from detr_ray.tracking.mlflow_client import open_client, run_of_uid
from detr_ray.tracking.reachability import try_store
from detr_ray.tracking.store import sqlite_path
from detr_ray.tracking.tracker import Status

_OF_A_CATEGORY = "val/AP/"
_ANSWER_WITHIN_S = 5.0


def fetch_history(uri: str, experiment: str, run_uid: str) -> RunHistory | None:
    """Reads a run's metrics and tags; those of single categories are left out.

    Args:
        uri: address of the store.
        experiment: name of the experiment.
        run_uid: identifies the run.

    Returns:
        What the store has; None where it has no such run.

    Raises:
        UnreachableError: the store cannot be used.
        MlflowException: the store refused, or failed while it was read.
    """
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        return None  # opening it would create it
    try_store(uri, _ANSWER_WITHIN_S)
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    run_id = None if found is None else run_of_uid(client, found.experiment_id, run_uid)
    if run_id is None:
        return None
    run = client.get_run(run_id)
    names = [name for name in run.data.metrics if not name.startswith(_OF_A_CATEGORY)]
    points = {name: client.get_metric_history(run_id, name) for name in names}
    began = run.info.start_time
    last = max([began, *(point.timestamp for found in points.values() for point in found)])
    # The end of a run that goes on again stays in MLflow beside its status RUNNING.
    ended = run.info.status in get_args(Status)
    return RunHistory(
        {name: _columns(found) for name, found in points.items()},
        dict(run.data.tags),
        [Session(began, run.info.end_time if ended else last, run.info.status if ended else None)],
    )


def _columns(points: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return np.array([point.step for point in ordered]), np.array([point.value for point in ordered])
