"""What a run tells its tracker about itself, beside the metrics."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from detr_ray import __version__
from detr_ray.config import Config, flatten
from detr_ray.engine.run_directory import absolute_storage
from detr_ray.tracking import MlflowTracker, NullTracker, Tracker, tracking_uri

if TYPE_CHECKING:
    from detr_ray.engine.job import TrainJob


def local_storage(config: Config) -> Path:
    """A local folder for what cannot live in a bucket: ``run.storage`` itself where it is local."""
    storage = absolute_storage(config.run.storage)
    return Path(tempfile.gettempdir()) / "detr_ray" if "://" in storage else Path(storage)


def run_tracking_uri(config: Config) -> str:
    """The address of the MLflow store that runs of a configuration go to."""
    return tracking_uri(config.tracking.uri, local_storage(config))


def open_tracker(job: TrainJob) -> Tracker:
    """The tracker of a run's rank 0, with the run's configuration and origin already in it.

    Args:
        job: the run. Started again, it goes on with the same MLflow run.
    """
    config, data = job.config, job.data
    assert data.train is not None
    if not config.tracking.enabled:
        return NullTracker()
    folder = (job.run.local_path or local_storage(config) / f"{job.run.name}-{job.run.run_id[:8]}") / "tracking"
    tracker = MlflowTracker(
        folder,
        uri=job.tracking_uri,
        experiment=config.tracking.experiment,
        run_name=job.run.name,
        run_uid=job.run.run_id,
    )
    tracker.log_params({key: value for key, value in flatten(config).items() if value is not None})
    tracker.log_text(config.to_yaml(), "config.yaml")
    tracker.set_tags(
        {
            "data.train.fingerprint": data.train.fingerprint,
            "data.train.images": str(len(data.train)),
            "data.classes": str(data.label_map.num_classes),
            "code.commit": job.code_version or "unknown",
            "detr_ray.version": __version__,
            "torch.version": torch.__version__,
            "python.version": platform.python_version(),
            "run.path": job.run.path,
        }
        | ({} if data.val is None else {"data.val.fingerprint": data.val.fingerprint})
    )
    return tracker
