"""A run, read back from its folder: record, checkpoints, metrics, and the detections of its best weights.

The detections of the best evaluation are kept in the run's folder together with the annotations they were scored
against, so that everything about them can be looked at without the data and without evaluating again.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from detr_ray.addresses import join, name_of, resolve
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError, config_from_dict
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.checkpoints.run_directory import (
    CONFIG,
    FREE_WITH_CHECKPOINT,
    RECORD,
    RunDirectory,
    record_at,
    storage_errors,
)
from detr_ray.engine.reporting.tracking_store import run_tracking_uri, tracking_folder
from detr_ray.evaluation import DetectionTable, GroundTruth
from detr_ray.evaluation.scorer_process import read_columns, write_columns
from detr_ray.locations import read_bytes, write_bytes
from detr_ray.tracking import Status
from detr_ray.tracking.history import RunHistory, read_history

_BEST_FOUND = "evaluation/best.npz"
_STEP = "step"


@dataclasses.dataclass(frozen=True)
class BestFound:
    """The detections of the best weights on the validation set.

    Attributes:
        step: optimizer steps that the weights had taken.
        truth: the annotations.
        detections: what was found.
    """

    step: int
    truth: GroundTruth
    detections: DetectionTable


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A run, read back from its folder.

    Attributes:
        directory: its folder.
        record: what it was begun with; see `open_run`.
        config: its configuration at its last start, with the first weights that it was begun with.
        checkpoints: those that are there, oldest first.
        history: its metrics; None where they are not on this machine.
        best: what its best weights found; None where that was not kept.
    """

    directory: RunDirectory
    record: Mapping[str, Any]
    config: Config
    checkpoints: list[CheckpointInfo]
    history: RunHistory | None
    best: BestFound | None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def best_checkpoint(self) -> CheckpointInfo | None:
        """The checkpoint with the highest AP."""
        return self.directory.checkpoints.best_of(self.checkpoints)

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Metric -> (epochs, values); steps in place of epochs where no epoch was logged."""
        if self.history is None:
            return {}
        steps, epochs = self.history.metrics.get("train/epoch", (np.zeros(0), np.zeros(0)))
        per_epoch = steps[-1] / epochs[-1] if len(steps) and epochs[-1] > 0 else 1.0
        return {name: (steps / per_epoch, values) for name, (steps, values) in self.history.metrics.items()}

    def with_status(self, status: Status) -> PastRun:
        """The run with this status of its last process, which may not be in its log yet."""
        if self.history is None or not self.history.sessions:
            return self
        *earlier, last = self.history.sessions
        history = dataclasses.replace(self.history, sessions=[*earlier, dataclasses.replace(last, status=status)])
        return dataclasses.replace(self, history=history)

    def last(self, metric: str) -> float | None:
        """The last value of a metric; None where it was not logged."""
        values = self.history.metrics.get(metric) if self.history is not None else None
        return None if values is None else float(values[1][-1])


def open_past_run(location: str, say: Say = lambda line: None) -> PastRun:
    """Reads a run from its folder.

    Args:
        location: its folder.
        say: shows a line about what this version does not know.

    Raises:
        ConfigError: there is no run, or what it left cannot be read.
    """
    path = resolve(location)
    with storage_errors(path, "the run"):
        record = record_at(join(path, RECORD))
        if record is None:
            from detr_ray.engine.checkpoints.found_model import near  # and the model, which a run is read without

            raise ConfigError(f"{location} is no folder of a run: it has no {RECORD}{near(location)}")
        directory = RunDirectory(name_of(path), path, record["run_id"], is_new=False)
        config = _config_of(path, record, say)
        checkpoints = directory.checkpoints.checkpoints()
        best = _read_best_found(path, say)
    history = _history_of(config, directory, bool(record.get("forked_from")), say)
    return PastRun(directory, record, config, checkpoints, history, best)


def keep_best_found(path: str, step: int, truth: GroundTruth, detections: DetectionTable) -> None:
    """Keeps what a run's best weights found, in place of what was kept before.

    Args:
        path: the run's folder.
        step: optimizer steps that the weights had taken.
        truth: the annotations of the validation set.
        detections: what was found.

    Raises:
        OSError: it could not be written.
    """
    content = io.BytesIO()
    write_columns(content, truth, detections, **{_STEP: np.array(step)})
    write_bytes(join(path, _BEST_FOUND), content.getvalue())


def _read_best_found(path: str, say: Say) -> BestFound | None:
    try:
        content = read_bytes(join(path, _BEST_FOUND))
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as columns:
            step = int(columns[_STEP])
        truth, detections = read_columns(io.BytesIO(content))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        say(f"WARNING: {join(path, _BEST_FOUND)} is damaged and left out: {error}")
        return None
    return BestFound(step, truth, detections)


def _config_of(path: str, record: Mapping[str, Any], say: Say) -> Config:
    """The configuration of a run.

    A start that goes on from a checkpoint need not name the first weights any more, so these are taken from the record.
    """
    location = join(path, CONFIG)
    try:
        content = yaml.safe_load(read_bytes(location))
    except FileNotFoundError as error:
        raise ConfigError(f"{location} is missing: the run was begun by a version that did not write it") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{location} is damaged: {error}") from error

    def warn(key: str) -> None:
        say(f"WARNING: {path} was trained with {key}, which this version does not know (any more)")

    for key in FREE_WITH_CHECKPOINT:
        section, _, name = key.partition(".")
        if key in record["config"]:
            content.setdefault(section, {})[name] = record["config"][key]
    return config_from_dict(content, location, warn)


def _history_of(config: Config, directory: RunDirectory, is_fork: bool, say: Say) -> RunHistory | None:
    """The metrics in the log on this machine; if its beginning is missing, those of the MLflow store as well."""
    history = read_history(tracking_folder(config, directory))
    if not config.tracking.enabled or (history is not None and (is_fork or _has_beginning(history))):
        return history
    from detr_ray.tracking.fetched_history import fetch_history  # and MLflow, which takes seconds

    try:
        fetched = fetch_history(run_tracking_uri(config), config.tracking.experiment, directory.run_id)
    except Exception as error:  # any error of a store: the run's other records are still of use
        which = "metrics" if history is None else "first metrics"
        say(f"WARNING: the run's {which} are neither on this machine nor to be had from its MLflow store: {error}")
        return history
    if history is None or fetched is None:
        return history or fetched
    return history.joined(fetched)


def _has_beginning(history: RunHistory) -> bool:
    """Whether the log has the run's first step; a run in a bucket may have begun on another machine."""
    steps, _ = history.metrics.get("train/epoch", (np.zeros(0), np.zeros(0)))
    return not len(steps) or int(steps[0]) <= 1
