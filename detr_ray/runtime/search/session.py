"""The Ray session of a search, and the number of concurrent trials on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from detr_ray.config import Config
from detr_ray.engine.context import uses_gpu
from detr_ray.runtime.session import ray_session
from detr_ray.search.reading import POPULATIONS

# Ray Tune's own files and output are not used, and its handler of Ctrl-C would not let trials write checkpoints.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "90",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextlib.contextmanager
def search_session(config: Config) -> Iterator[None]:
    """The Ray session of a search: an existing cluster, or a Ray on this machine with room for concurrent trials."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    workers = most_workers(config)
    at_once = trials_on_this_machine(config, workers)
    cpus = at_once * (workers + 1)
    with ray_session(
        at_once * workers, config.data.tasks_per_worker, config.train.use_gpu, config.train.worker_resource, cpus
    ):
        yield


def most_workers(config: Config) -> int:
    """The largest number of workers of a trial."""
    return (config.train.worker_range or (1, 1))[1]


def trials_on_this_machine(config: Config, workers: int) -> int:
    """The number of concurrent trials on this machine: one for each core or GPU, at least one.

    A population needs all of its trials at the same time: they share the cores.
    """
    settings = config.tune
    if config.tune.scheduler in POPULATIONS:
        return settings.trials
    units = torch.cuda.device_count() if uses_gpu(config.train.use_gpu) else (os.cpu_count() or 1)
    return max(1, min(units // workers, settings.max_concurrent or units, settings.trials))
