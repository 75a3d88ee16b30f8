"""One MLflow run: found or created in a store, then written to.

Sending anything twice gives the same result: a metric keeps its first point of a step, a parameter its first value, an
artifact its last content. So a sender that died before it noted what it had sent can send again. MLflow is imported
when a run is opened, not when this module is imported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detr_ray.printable import shortened
from detr_ray.tracking.mlflow_client import UID_TAG, first_line, made_experiment, open_client, run_of_uid
from detr_ray.tracking.store import public_uri
from detr_ray.tracking.whole_files import write_whole

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
"""The tag that MLflow knows a run's parent by."""
_PROBE_TAG = "detr_ray.probe"
_SETTINGS_NAME = "run.json"
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_LONGEST_PARAM = 500
_LONGEST_TAG = 5000
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}


class RunGoneError(Exception):
    """The MLflow run was deleted while this process wrote to it."""


class RefusedError(Exception):
    """MLflow rejects this content, and will do so again; the message is MLflow's reason."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Which MLflow run a training run writes to.

    Attributes:
        tracking_uri: address of the store.
        experiment: name of the experiment; made if missing.
        run_name: what MLflow shows as the run's name.
        run_uid: identifies the MLflow run, as its tag ``detr_ray.run_uid``.
    """

    tracking_uri: str
    experiment: str
    run_name: str
    run_uid: str

    def save(self, folder: Path) -> None:
        """Writes the settings into a folder, without passwords, so that ``send_pending`` finds the run later."""
        content = asdict(self) | {"tracking_uri": public_uri(self.tracking_uri)}
        write_whole(folder / _SETTINGS_NAME, json.dumps(content, indent=1))

    @classmethod
    def load(cls, folder: Path) -> RunSettings | None:
        """Reads what ``save`` wrote; None if there is no readable file."""
        try:
            settings = cls(**json.loads((folder / _SETTINGS_NAME).read_text(encoding="utf-8")))
        except (FileNotFoundError, TypeError, ValueError, RecursionError):
            return None
        return settings if all(isinstance(value, str) for value in asdict(settings).values()) else None


Row = tuple[str, float, int, int]
"""Metric, value, milliseconds since 1970, step."""


class LoggedPoints:
    """Which metric points MLflow already has. MLflow keeps one point a step of each metric, however often it is logged.

    A run that resumes at step ``k`` logs the steps after ``k`` again, and a sender that died may have sent points that
    it did not note. The first point of a step stays: training is deterministic, so later points differ only in time.
    Most steps are newer than the last step of their metric. Only where a metric's steps start again, all its steps are
    fetched from MLflow, and dropped once logging has passed them.

    Args:
        last_steps: metric -> its last step in MLflow.
        fetch_steps: returns all steps of a metric in MLflow.
    """

    def __init__(self, last_steps: Mapping[str, int], fetch_steps: Callable[[str], Iterable[int]]) -> None:
        self._last = dict(last_steps)
        self._fetch_steps = fetch_steps
        self._steps: dict[str, set[int]] = {}

    def new_among(self, rows: Iterable[Row]) -> list[Row]:
        """The rows whose point is not in MLflow yet. Of several rows with the same metric and step, the first."""
        found: dict[tuple[str, int], Row] = {}
        for row in rows:
            name, _, _, step = row
            if (name, step) not in found and not self._has(name, step):
                found[name, step] = row
        return list(found.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Notes rows that were sent to MLflow."""
        for name, _, _, step in rows:
            if step > self._last.get(name, step - 1):
                self._last[name] = step
                self._steps.pop(name, None)
            elif name in self._steps:
                self._steps[name].add(step)

    def _has(self, name: str, step: int) -> bool:
        if step > self._last.get(name, step - 1):
            return False
        if name not in self._steps:
            self._steps[name] = set(self._fetch_steps(name))
        return step in self._steps[name]


class MlflowRun:
    """An open MLflow run.

    Attributes:
        run_id: MLflow's id.
        status: MLflow's status when it was opened.
        ended_ms: when it ended (milliseconds since 1970) as MLflow said when it was opened; None: it never did.
        is_deleted: whether it was deleted when it was opened.
        last_metric_ms: time of its newest metric when it was opened, in milliseconds since 1970; None: it has none.
        refused: number of values that MLflow rejected.
        suspicious: whether to search a failed batch for the value that makes the store fail. The sender sets this after
            several failures: for a value that they cannot store, some stores return a general error instead of a
            rejection, and the sender would repeat the same batch for ever.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id = run_id
        self.refused = 0
        self.suspicious = False
        run = client.get_run(run_id)
        data = run.data
        self.status: str = run.info.status
        self.ended_ms: int | None = run.info.end_time
        self.is_deleted: bool = run.info.lifecycle_stage == "deleted"
        self.last_metric_ms: int | None = max((metric.timestamp for metric in data.to_proto().metrics), default=None)
        self._params: dict[str, str] = dict(data.params)
        self._tags: dict[str, str] = dict(data.tags)
        last_steps = {metric.key: metric.step for metric in data.to_proto().metrics}
        self._points = LoggedPoints(last_steps, self._steps_of)

    def _steps_of(self, metric: str) -> list[int]:
        return [point.step for point in self._client.get_metric_history(self.run_id, metric)]

    @classmethod
    def open(cls, settings: RunSettings, known_run_id: str | None, started_ms: int) -> MlflowRun:
        """Connects to the store and makes sure that the run is there.

        If a run with this uid exists, it is used; if it or its experiment was deleted, it is restored, because a
        training run writes to it. Otherwise the run, and its experiment if missing, are created.

        Args:
            settings: which run.
            known_run_id: MLflow's id of the run, if known from earlier.
            started_ms: start time of a new run, in milliseconds since 1970.

        Raises:
            Exception: Any error of MLflow where the store cannot be reached; opening may be tried again.
        """
        client = open_client(settings.tracking_uri)
        run_id = known_run_id if known_run_id and _run_exists(client, known_run_id) else None
        if run_id is None:
            experiment_id = made_experiment(client, settings.tracking_uri, settings.experiment)
            run_id = run_of_uid(client, experiment_id, settings.run_uid)
        if run_id is None:
            tags = {UID_TAG: settings.run_uid}
            created = client.create_run(experiment_id, start_time=started_ms, tags=tags, run_name=settings.run_name)
            run_id = created.info.run_id
        _restore(client, run_id)
        return cls(client, run_id)

    def log_metrics(self, rows: Sequence[Row]) -> None:
        """Sends the points that the run does not have yet."""
        from mlflow.entities import Metric

        new = self._points.new_among(rows)
        self._log("metrics", [Metric(*row) for row in new])
        self._points.add(new)

    def log_params(self, params: dict[str, str]) -> None:
        """Sends parameters. MLflow keeps the first value; a changed value becomes the tag ``resume/<name>``."""
        from mlflow.entities import Param

        values = {name: shortened(value, _LONGEST_PARAM) for name, value in params.items()}
        new = {name: value for name, value in values.items() if name not in self._params}
        self._log("params", [Param(name, value) for name, value in new.items()])
        self._params.update(new)
        changes = {f"resume/{name}": value for name, value in values.items() if self._is_change(name, value)}
        self.set_tags(changes)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Sends tags that are new or have changed."""
        from mlflow.entities import RunTag

        values = {name: shortened(value, _LONGEST_TAG) for name, value in tags.items()}
        new = {name: value for name, value in values.items() if self._tags.get(name) != value}
        self._log("tags", [RunTag(name, value) for name, value in new.items()])
        self._tags.update(new)

    @property
    def tags(self) -> Mapping[str, str]:
        """The run's tags, as far as this process knows."""
        return self._tags

    def delete_tags(self, names: Iterable[str]) -> None:
        """Deletes those of the tags that the run has."""
        for name in [name for name in names if name in self._tags]:
            self._call(lambda name=name: self._client.delete_tag(self.run_id, name))  # type: ignore[misc]
            del self._tags[name]

    def set_running(self) -> None:
        """Marks the run as running, also if it had ended."""
        self._call(lambda: self._client.update_run(self.run_id, status="RUNNING"))

    def set_ended(self, status: str, ended_ms: int) -> None:
        """Marks the run as ended."""
        self._call(lambda: self._client.set_terminated(self.run_id, status=status, end_time=ended_ms))

    def upload(self, path: Path, artifact_dir: str) -> None:
        """Stores a file, or a folder's content, in a folder of the run's artifacts.

        Raises:
            RefusedError: MLflow does not take such an artifact.
        """
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._call(lambda: send(self.run_id, str(path), artifact_dir or None))

    def upload_text(self, text: str, artifact_file: str) -> None:
        """Stores a text as a file of the run's artifacts.

        Raises:
            RefusedError: MLflow does not take such an artifact.
        """
        self._call(lambda: self._client.log_text(self.run_id, text, artifact_file))

    def check(self) -> None:
        """Raises MLflow's error if the store does not answer, and ``RunGoneError`` if the run was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            stage = self._client.get_run(self.run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(f"MLflow run {self.run_id} is gone") from error
            raise
        if stage == "deleted":
            raise RunGoneError(f"MLflow run {self.run_id} was deleted")

    def _is_change(self, name: str, value: str) -> bool:
        return self._params[name] != value or f"resume/{name}" in self._tags

    def _log(self, kind: str, entities: list[Any]) -> None:
        for start in range(0, len(entities), _BATCH[kind]):
            self._log_one_by_one_if_refused(kind, entities[start : start + _BATCH[kind]])

    def _log_one_by_one_if_refused(self, kind: str, entities: list[Any]) -> None:
        """Sends a batch. If MLflow rejects it, finds the rejected values by halving and leaves only these out."""
        try:
            self._call(lambda: self._client.log_batch(self.run_id, **{kind: entities}))
            return
        except RefusedError as error:
            refusal = error
        except Exception as error:
            if not self.suspicious:
                raise
            self._client.set_tag(self.run_id, _PROBE_TAG, kind)  # raises if the store fails for any content
            refusal = RefusedError(first_line(error))
        if len(entities) > 1:
            middle = len(entities) // 2
            self._log_one_by_one_if_refused(kind, entities[:middle])
            self._log_one_by_one_if_refused(kind, entities[middle:])
            return
        self.refused += 1
        logger.warning("MLflow refuses %s %r: %s", kind, entities[0].key, refusal)

    def _call(self, send: Callable[[], object]) -> None:
        """Sends; raises `RefusedError` for a rejection and `RunGoneError` for a deleted run. Other errors may pass."""
        from mlflow.exceptions import MlflowException

        try:
            send()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" or error.error_code in _REFUSALS:
                self.check()
            if error.error_code in _REFUSALS:
                raise RefusedError(first_line(error)) from error
            raise


def _run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _restore(client: Any, run_id: str) -> None:
    run = client.get_run(run_id)
    if client.get_experiment(run.info.experiment_id).lifecycle_stage == "deleted":
        client.restore_experiment(run.info.experiment_id)
        logger.warning("the MLflow experiment of run %s was deleted: restored, because the run writes to it", run_id)
        run = client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
        logger.warning("MLflow run %s was deleted: restored, because this process writes to it", run_id)
