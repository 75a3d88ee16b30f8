"""Connections to MLflow's stores. MLflow is imported when a store is opened, not when this module is imported."""

from __future__ import annotations

import logging
import os
from typing import Any

from detr_ray.credentials import without_credentials
from detr_ray.printable import shortened
from detr_ray.tracking.store import artifact_location, sqlite_path, sqlite_uri
from detr_ray.tracking.whole_files import create_database_whole

logger = logging.getLogger(__name__)

UID_TAG = "detr_ray.run_uid"
"""The tag that this package finds runs by, on any machine."""
_ENVIRONMENT = {
    # The sender repeats failed calls. MLflow's own retries would block a call for minutes and log every attempt.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # No output of MLflow's own in a training job, and no connection to the internet.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def set_environment() -> None:
    """Sets MLflow's environment variables that are not set yet; it reads them when it is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def open_client(tracking_uri: str) -> Any:
    """An ``MlflowClient`` of a store. The tables of an SQLite database that does not exist yet are created.

    Raises:
        Exception: Any error of MLflow where the database cannot be created.
    """
    set_environment()
    from mlflow import MlflowClient  # takes two seconds

    database = sqlite_path(tracking_uri)
    if database is not None:
        create_database_whole(database, lambda draft: _make_tables(MlflowClient(sqlite_uri(draft))))
    return MlflowClient(tracking_uri)


def made_experiment(client: Any, tracking_uri: str, name: str) -> str:
    """The id of an experiment, which is created if it is missing, and restored if it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            location = artifact_location(tracking_uri)
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another run has just created it
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        logger.warning("MLflow experiment %r was deleted: restored, because this run writes to it", name)
    return experiment.experiment_id


def run_of_uid(client: Any, experiment_id: str, run_uid: str) -> str | None:
    """The id of the run with this uid, deleted or not; the oldest if there are several; None if there is none."""
    from mlflow.entities import ViewType

    query = f"tags.`{UID_TAG}` = '{run_uid}'"
    runs = client.search_runs(
        [experiment_id], query, run_view_type=ViewType.ALL, max_results=1, order_by=["attributes.start_time ASC"]
    )
    return runs[0].info.run_id if runs else None


def first_line(error: Exception) -> str:
    """The first line of an error, without passwords."""
    return shortened(without_credentials((str(error).splitlines() or [type(error).__name__])[0]), 300)


def _make_tables(client: Any) -> None:
    client.search_experiments(max_results=1)  # the first query makes MLflow create the tables
