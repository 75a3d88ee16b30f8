"""Loads the same model in all replicas, wherever and whenever they start."""

from __future__ import annotations

import functools
from collections.abc import Callable

from detr_ray.addresses import MLFLOW_SCHEMES, local_path, resolve
from detr_ray.config import Config
from detr_ray.engine.reporting.tracking_store import run_tracking_uri
from detr_ray.model_sources import load_model
from detr_ray.prediction import LoadedModel
from detr_ray.tracking.fetching import pinned


def loader(source: str, config: Config) -> Callable[[], LoadedModel]:
    """A function that loads a model, to be called in other processes and on other machines.

    Paths are made absolute, because replicas run in another folder. An alias in MLflow's registry is resolved now:
    otherwise a replica that is started later might have another model.

    Args:
        source: as `load_model` takes it.
        config: likewise.

    Raises:
        RegistryError: MLflow has no such version.
    """
    if source.startswith(MLFLOW_SCHEMES):
        store = run_tracking_uri(config)
        tracking = config.tracking.model_copy(update={"uri": store})
        return functools.partial(load_model, pinned(source, store), config.model_copy(update={"tracking": tracking}))
    path = local_path(source)
    return functools.partial(load_model, resolve(source) if path is not None and path.exists() else source, config)
