"""Finds and loads models, wherever they are stored: `detr_ray.load_model`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from detr_ray.addresses import MLFLOW_SCHEMES, join
from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.detector.artifact import SCORES_FILE, SavedModel
from detr_ray.detector.package import ModelFacts, package_of, read_model, read_package
from detr_ray.engine.checkpoints.found_model import FoundModel, find_model
from detr_ray.engine.reporting.tracking_store import run_tracking_uri
from detr_ray.locations import read_bytes
from detr_ray.model.state_dicts import DamagedFileError, WeightsError
from detr_ray.prediction import LoadedModel
from detr_ray.retries import reason_of
from detr_ray.tracking.fetching import fetched, pinned

logger = logging.getLogger(__name__)

_AGAIN = "; if its training still runs, it may be storing a better checkpoint just now: try again in a minute"


@contextlib.contextmanager
def located(source: str, config: Config | None) -> Iterator[str]:
    """The location of a model. For an address of MLflow it is the folder of the files, or of a temporary copy.

    Args:
        source: see `load_model`.
        config: see `load_model`.

    Raises:
        RegistryError: MLflow does not have this version, or its files.
        WeightsError: the block cannot use the files; the message says where they are from, and to try again if a run
            may just be writing them.
    """
    if not source.startswith(MLFLOW_SCHEMES):
        yield source
        return
    with fetched(source, None if config is None else run_tracking_uri(config)) as place:
        try:
            yield place
        except WeightsError as error:
            may_be_written = source.startswith("runs:") and isinstance(error, DamagedFileError)
            raise WeightsError(f"{source}: {error}{_AGAIN if may_be_written else ''}") from error


@contextlib.contextmanager
def with_located_model(config: Config) -> Iterator[Config]:
    """The configuration with the location of its model (``eval.checkpoint``) in place of an address of MLflow.

    Raises:
        ConfigError: no model is named.
        RegistryError: MLflow does not have this version, or its files.
    """
    with located(config.checkpoint_to_evaluate(), config) as place:
        yield config.model_copy(update={"eval": config.eval.model_copy(update={"checkpoint": place})})


def _log(line: str) -> None:
    """Shows a line where there is no command to print it: Python prints warnings that no program handles."""
    logger.warning("%s", line.removeprefix("WARNING: "))


def load_model(source: str, config: Config | None = None, scores: str | None = None, say: Say = _log) -> LoadedModel:
    """Loads a model for use.

    Args:
        source: a run's folder (of its checkpoints the one with the highest AP), a checkpoint's folder, the folder of a
            model package, a model file, published weights (``.pth``, ``.safetensors``), or the URL of a file. Paths
            and addresses (``s3://``, ``gs://``). Of MLflow's registry: ``models:/NAME@ALIAS``,
            ``models:/NAME/VERSION``, ``runs:/RUN``; see `detr_ray.tracking.fetching`.
        config: architecture and image sizes for weights of other programs, whose files do not have them; None for the
            published DETR with a ResNet-50. Models of this project have their own. Its ``tracking.uri`` and
            ``run.storage`` name the MLflow store, as for a training. Without a configuration,
            ``MLFLOW_TRACKING_URI`` names it; the default is ``runs/mlflow.db``.
        scores: path or address of the file that the evaluate command wrote (``--scores``), for ``threshold="best_f1"``.
            Models that were evaluated in training have this file beside them.
        say: shows the user a line; by default it is logged.

    Raises:
        ConfigError: there is no model, or its configuration is not valid in this version.
        WeightsError: it cannot be fetched, is damaged, was changed, or is of another architecture.
        RegistryError: MLflow does not have this version, or its files.
    """
    if not source.startswith(MLFLOW_SCHEMES):
        return _loaded(source, None, config, scores, say)
    # Of an alias the version that it means now: the model says which one it is.
    source = pinned(source, None if config is None else run_tracking_uri(config))
    with located(source, config) as place:
        model = _loaded(place, source, config, scores, say)
    model.source = source  # the file may have been a temporary copy
    return model


def _loaded(place: str, address: str | None, config: Config | None, scores: str | None, say: Say) -> LoadedModel:
    """The model in a place, which is a copy of what is at an address of MLflow; None for what is no copy."""
    found = find_model(place, "model")
    folder = package_of(found.file)
    if folder is None:
        saved = read_model(found.file, say, found.sha256)
        facts = _facts(found, saved, address)
    else:
        package = read_package(folder, say)
        saved, facts = package.saved, package.facts
    if scores is not None:
        measured = _read_scores(scores)
        if measured is None:
            raise WeightsError(f"{scores}: there is no such file; evaluate --scores writes it")
        facts = dataclasses.replace(facts, scores=measured)
    return LoadedModel(saved, facts, config)


def _facts(found: FoundModel, saved: SavedModel, address: str | None) -> ModelFacts:
    """Facts about a model file, from itself and from its checkpoint."""
    own: Mapping[str, Any] = {} if saved.config is None else saved.checkpoint
    version = str(own.get("code_version", ""))  # earlier releases did not write it
    origin = {"code_commit": str(own["code_commit"])} if own.get("code_commit") else {}
    info = found.checkpoint
    if info is None:
        return ModelFacts(version, origin=origin)
    evaluation: dict[str, Any] = {}
    if info.metrics is not None:
        evaluation = {"metrics": dict(info.metrics), "measured_on": dict(info.measured_on)}
    scores = _read_scores(join(info.path, SCORES_FILE))
    # Among the artifacts of an MLflow run, the manifest says which run it is.
    run = info.details.get("origin", {})
    return ModelFacts(version, evaluation, scores, {"checkpoint": address or info.path, **run, **origin})


def _read_scores(location: str) -> dict[str, Any] | None:
    """The quality of a model's scores, from the file of an evaluation; None if there is no such file.

    Raises:
        WeightsError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(read_bytes(location))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightsError(f"{location} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise WeightsError(f"{location} is damaged: no JSON: {error}") from error
    if not isinstance(content, dict) or not {"all", "categories"} <= content.keys():
        raise WeightsError(
            f"{location} does not say what scores mean; the evaluate command writes such a file (--scores)"
        )
    return content
