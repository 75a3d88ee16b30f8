"""What is recorded about a run beside its metrics."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch

from detr_ray import __version__
from detr_ray.config import flatten
from detr_ray.engine.reporting.tracking_store import local_storage, tracking_folder
from detr_ray.tracking import PARENT_TAG, MlflowTracker, NullTracker, Tracker
from detr_ray.tracking.run_progress import ProgressTracker, RunProgress

if TYPE_CHECKING:
    from detr_ray.engine.job import TrainJob

FAILURE_TAG = "run.failed"
"""Why a run failed. The tag stays when the run goes on, and says something only where its last session failed."""


def open_tracker(job: TrainJob) -> Tracker:
    """The tracker of a run's rank 0, with the run's configuration and origin already in it.

    It also keeps the run's progress in the run's folder, whether or not there is an MLflow store.

    Args:
        job: the run. Started again, it goes on with the same MLflow run.
    """
    return ProgressTracker(
        _records_of(job), job.run.path, RunProgress(job.run.name, job.total_steps, job.steps_per_epoch)
    )


def _records_of(job: TrainJob) -> Tracker:
    config, data = job.config, job.data
    assert data.train is not None
    if not config.tracking.enabled:
        return NullTracker()
    if job.run.local_path is None:
        local_storage(config).mkdir(mode=0o700, parents=True, exist_ok=True)
    tracker = MlflowTracker(
        tracking_folder(config, job.run),
        uri=job.tracking_uri,
        experiment=config.tracking.experiment,
        run_name=job.run.name,
        run_uid=job.run.run_id,
    )
    used = {key: value for key, value in flatten(config).items() if value is not None and not key.startswith("tune.")}
    tracker.log_params(used)
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
        | ({} if job.fork is None else {"run.forked_from": job.fork.path})
        | ({} if job.parent_run is None else {PARENT_TAG: job.parent_run})
    )
    return tracker
