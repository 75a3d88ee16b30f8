"""Makes a checkpoint a version of a registered model, and decides whether it becomes the champion.

`register` is called by the command, and at the end of a training and of a search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr_ray.addresses import MLFLOW_SCHEMES, is_uri, join, parent, resolve
from detr_ray.callbacks import Say
from detr_ray.coco_numbers import COCO_METRICS
from detr_ray.config import Config, ConfigError
from detr_ray.config.loading import config_from_dict
from detr_ray.data.errors import DataError
from detr_ray.detector.artifact import SavedModel
from detr_ray.detector.package import PACKAGE_FILE, WEIGHTS_FILE, ModelFacts, write_package
from detr_ray.engine.checkpoints.info import measured_alike
from detr_ray.engine.checkpoints.run_directory import RECORD, record_at
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.reporting.tracking_store import run_tracking_uri
from detr_ray.engine.validation.evaluation_job import evaluation_config, prepare_evaluation
from detr_ray.evaluation import CocoMetrics
from detr_ray.model.state_dicts import WeightsError
from detr_ray.model_sources import load_model, located
from detr_ray.runtime.launch import run_prepared_evaluation
from detr_ray.tracking import public_uri
from detr_ray.tracking.champion import CannotBeMeasured, Decision, decide, is_decided, undecided_tags
from detr_ray.tracking.fetching import fetched_version, has_record
from detr_ray.tracking.logged_model import NewVersion, add_version
from detr_ray.tracking.registry import (
    CHECKPOINT,
    MEASURED_ON,
    PACKAGE_SHA256,
    REASON,
    WEIGHTS_SHA256,
    ModelRegistry,
    ModelVersion,
    RegistryError,
)

_CODE = Path(__file__).with_name("mlflow_model.py")
"""The file that MLflow runs to serve a version. It is not imported, because importing it makes MLflow serve."""
_LEFT_OUT = (RegistryError, ConfigError, DataError, WeightsError, RunFailed, OSError)
"""Errors of registration that do not let a training fail."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """The result of registering a checkpoint.

    Attributes:
        version: the version of the registered model.
        decision: whether it is the champion, and why; None if it had been registered before.
    """

    version: ModelVersion
    decision: Decision | None


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A model that is to be registered, and facts about it."""

    saved: SavedModel
    facts: ModelFacts
    source: str

    @property
    def metrics(self) -> dict[str, float]:
        known = self.facts.evaluation.get("metrics") or {}
        return {name: known[name] for name in COCO_METRICS if name in known}

    @property
    def measured_on(self) -> dict[str, Any]:
        return dict(self.facts.evaluation.get("measured_on") or {})


def register(config: Config, source: str, say: Say) -> Registered:
    """Makes a checkpoint a version of the registered model, and the champion if it is better.

    A checkpoint is not registered again if its weights are a version already, measured on the same data. If it was not
    evaluated, it is evaluated first, if there is validation data: that of the configuration, or its run's own.

    Args:
        config: ``tracking`` has the store and the model's name. ``data``, ``eval`` and ``train``, if given, say how it
            is measured, and a champion that was measured on other data.
        source: a run's folder (its best checkpoint), a checkpoint, a model package, or a file or URL of weights.
        say: shows the user a line.

    Raises:
        RegistryError: the registry does not answer, or refuses it.
        ConfigError: there is no such checkpoint, or the configuration does not fit it.
        WeightsError: it is damaged.
        DataError: its validation data cannot be used.
        RunFailed: it cannot be evaluated.
    """
    candidate = _candidate(config, source, say)
    registry = ModelRegistry(run_tracking_uri(config), config.tracking.model_name, create=True)
    if not candidate.metrics:
        candidate = _evaluated(config, candidate, say)
    with tempfile.TemporaryDirectory(prefix="detr_ray-package-") as workplace:
        package = Path(workplace, "package")
        record = write_package(str(package), candidate.saved, candidate.facts)
        known = _known(registry, record.files[WEIGHTS_FILE], candidate.measured_on)
        if known is not None:
            say(f"{source} is {known} already ({known.tags.get(REASON, 'without a decision')})")
            return Registered(known, None)
        version = add_version(registry, _new_version(candidate, package, record.files[WEIGHTS_FILE]))
    say(f"registered {source} as {version}")
    decision = decide(
        registry,
        version,
        config.tracking.champion_margin,
        lambda champion: _measured_anew(config, candidate, registry, champion, say),
        say,
    )
    say(f"{version} {'is the champion' if decision.is_champion else 'is not the champion'}: {decision.reason}")
    return Registered(registry.version(version.version), decision)


def register_or_warn(config: Config, run_path: str, say: Say) -> Registered | None:
    """Registers the best checkpoint of a run that has ended. Errors become warnings; the run does not fail.

    Returns:
        The result; None if it could not be registered.
    """
    try:
        return register(config, run_path, say)
    except _LEFT_OUT as error:
        tracking = config.tracking
        command = shlex.join(
            [
                *("python", "-m", "detr_ray.registry", "register", run_path),
                f"tracking.uri={public_uri(run_tracking_uri(config))}",
                f"tracking.model_name={tracking.model_name}",
                f"tracking.champion_margin={tracking.champion_margin:g}",
            ]
        )
        say(f"WARNING: the best checkpoint is not registered: {error}. To register it later: {command}")
        return None


def _candidate(config: Config, source: str, say: Say) -> _Candidate:
    """Reads a model, with the facts from its files, its checkpoint and its run."""
    loaded = load_model(source, config, say=say)
    facts = loaded.facts
    checkpoint = facts.origin.get("checkpoint")
    if checkpoint is not None and "run" not in facts.origin and not checkpoint.startswith(MLFLOW_SCHEMES):
        facts = dataclasses.replace(facts, origin={**facts.origin, **_run_of(checkpoint)})
    place = source if is_uri(source) or source.startswith(MLFLOW_SCHEMES) else resolve(source)
    return _Candidate(loaded.saved, facts, checkpoint or place)


def _run_of(checkpoint: str) -> dict[str, Any]:
    """Facts about the run of a checkpoint; empty if it belongs to none."""
    run = parent(parent(checkpoint))
    with contextlib.suppress(ConfigError):  # a damaged record: only the origin of the model is unknown
        record = record_at(join(run, RECORD))
        if record is not None:
            return {"run": run, "run_id": record["run_id"], "fingerprints": dict(record["fingerprints"])}
    return {}


def _evaluated(config: Config, candidate: _Candidate, say: Say) -> _Candidate:
    """The candidate with its metrics, if there is validation data."""
    settings, _ = evaluation_config(config, candidate.saved.config, candidate.saved.source)
    if not settings.data.has_val:
        say("WARNING: it was not evaluated, and no validation data is given (data.root, data.val): it has no AP")
        return candidate
    say("it was not evaluated: measuring it")
    metrics, measured_on = _measured(settings, candidate.saved.source, say)
    evaluation = {"metrics": metrics.as_metrics(), "measured_on": measured_on}
    scores = {"measured_on": measured_on, **metrics.scores} if metrics.scores else None
    return dataclasses.replace(
        candidate, facts=dataclasses.replace(candidate.facts, evaluation=evaluation, scores=scores)
    )


def _measured_anew(
    config: Config, candidate: _Candidate, registry: ModelRegistry, champion: ModelVersion, say: Say
) -> float:
    """The AP of a champion on the validation data of the candidate, measured in the same way.

    Raises:
        CannotBeMeasured: the data does not exist any more, has other categories, or the champion's files are missing.
    """
    try:
        settings, _ = evaluation_config(config, candidate.saved.config, candidate.saved.source)
        with fetched_version(registry, champion) as folder:
            numbers, measured_on = _measured(settings, folder, say)
    except _LEFT_OUT as error:
        raise CannotBeMeasured(str(error)) from error
    if not measured_alike(measured_on, candidate.measured_on):
        raise CannotBeMeasured(
            f"the validation data or settings are others now ({_values(measured_on)}) than those that the new version "
            f"was measured with ({_values(candidate.measured_on)})"
        )
    metrics = numbers.as_metrics()
    if "val/AP" not in metrics:
        raise CannotBeMeasured("the validation data has no boxes to score against")
    return metrics["val/AP"]


def _measured(settings: Config, source: str, say: Say) -> tuple[CocoMetrics, dict[str, Any]]:
    """The numbers of a model, and data and settings of the measurement; all settings count as given."""
    values = settings.to_dict()
    with located(source, settings) as place:
        values["eval"] |= {"checkpoint": place}
        job = prepare_evaluation(config_from_dict(values, source, say), say)
    return run_prepared_evaluation(job, say).metrics, job.data.measured_on


def _known(registry: ModelRegistry, weights_sha256: str, measured_on: Mapping[str, Any]) -> ModelVersion | None:
    """The version with these weights and the same measurement that was decided about, and whose files are there."""
    versions = [version for version in registry.versions() if version.tags.get(WEIGHTS_SHA256) == weights_sha256]
    alike = [each for each in versions if each.measured_on == measured_on and is_decided(each)]
    return next((each for each in alike if has_record(registry, each)), None)


def _new_version(candidate: _Candidate, package: Path, weights_sha256: str) -> NewVersion:
    saved, facts = candidate.saved, candidate.facts
    assert saved.config is not None and saved.label_map is not None, "completed when it was read"
    origin = facts.origin
    tags = {
        CHECKPOINT: candidate.source,
        PACKAGE_SHA256: hashlib.sha256((package / PACKAGE_FILE).read_bytes()).hexdigest(),
        WEIGHTS_SHA256: weights_sha256,
        MEASURED_ON: json.dumps(candidate.measured_on),
        "step": str(saved.step),
        "architecture": saved.config.model.architecture,
        "classes": str(len(saved.label_map.categories)),
        "run.path": str(origin.get("run", "")),
        "detr_ray.version": facts.code_version,
        "code.commit": str(origin.get("code_commit", "")),
    }
    tags |= {f"data.{split}.fingerprint": value for split, value in (origin.get("fingerprints") or {}).items()}
    tags |= {name: repr(value) for name, value in candidate.metrics.items()}
    metadata = {
        "labels": {str(category_id): name for category_id, name in saved.label_map.categories},
        "evaluation": {"metrics": candidate.metrics, "measured_on": candidate.measured_on},
        "origin": dict(origin),
    }
    return NewVersion(
        package=package,
        code=_CODE,
        metadata=metadata,
        tags={key: value for key, value in tags.items() if value} | undecided_tags(),
        experiment=saved.config.tracking.experiment,
        run_uid=origin.get("run_id"),
        top_k=saved.config.eval.max_detections,
    )


def _values(measured_on: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in measured_on.items())
