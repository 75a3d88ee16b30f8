"""A model and a data set small enough to train in seconds, for tests."""

from __future__ import annotations

from pathlib import Path

from defaults import draw_shapes

from detr_ray.config import Config, load_config
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker, Tracker

TINY = (
    "data.augment={scales: [48, 64], max_size: 96, crop: 0}",
    "model={backbone: resnet18, backbone_norm: batch, backbone_weights: none, backbone_stride: 8, hidden_dim: 32}",
    "model.num_heads=2",
    "model.dim_feedforward=64",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.num_queries=8",
    "eval={size: 48, max_size: 96}",
    "train={epochs: 2, global_batch_size: 8, log_every_steps: 1, use_gpu: false, launcher: local, record_stream: true}",
    "tracking={enabled: false, report: false}",
)


def make_dataset(root: Path, num_train: int = 40, num_val: int = 8, **arguments: object) -> Path:
    """Draws a small data set in COCO's layout."""
    values: dict[str, object] = {"seed": 3, "image_size": (48, 72), "max_objects": 3, **arguments}
    draw_shapes(root, num_train=num_train, num_val=num_val, **values)
    return root


def tiny_config(data_root: Path, storage: Path, *overrides: str) -> Config:
    """A configuration that trains a tiny model on such a data set."""
    return load_config(None, [*TINY, f"data.root={data_root}", f"run.storage={storage}", *overrides])


def fit_here(config: Config, tracker: Tracker | None = None, stop_after: int | None = None) -> FitResult:
    """Trains in this process.

    Args:
        config: what to train.
        tracker: takes the metrics.
        stop_after: ask the loop to stop after so many of its steps.
    """
    job = prepare_job(config, lambda line: None)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    with job.run.locked():
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        context = LocalContext(should_stop=should_stop)
        return TrainingLoop(job, context, batches, tracker or MemoryTracker()).run()
