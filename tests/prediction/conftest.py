"""A trained run that the tests of prediction share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.engine.reporting.progress import FitResult


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose validation images have different sizes."""
    return make_dataset(tmp_path_factory.mktemp("prediction") / "shapes", num_train=8, num_val=6, image_size=(40, 90))


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A run with two checkpoints, whose sizes and numbers of detections are not the defaults."""
    storage = tmp_path_factory.mktemp("prediction-runs")
    settings = (
        "run.name=a",
        "train.epochs=2",
        "eval.max_detections=7",
        "eval.max_size=60",
        "optim.lr=1e-2",
        "optim.ema_decay=0.5",
    )
    return fit_here(tiny_config(shapes, storage, *settings))
