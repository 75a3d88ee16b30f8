"""Case modules have asserts that pytest shows in full."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_dataset

SECTIONS = (
    "run",
    "data",
    "augment",
    "model",
    "deformable",
    "dino",
    "loss",
    "optim",
    "train",
    "evaluation",
    "tracking",
    "tune",
    "on_ray",
)
pytest.register_assert_rewrite(*(f"config_keys.{section}_cases" for section in SECTIONS))


@pytest.fixture(scope="session")
def key_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("keys") / "shapes", num_train=16, num_val=4, image_size=(40, 90))
