"""What the configuration keys do that mean something on Ray alone; the others: ``tests/config_keys``."""

from __future__ import annotations

from pathlib import Path

import config_keys.on_ray_cases  # noqa: F401 - registers the cases
import pytest
from config_keys.registry import RAY_CASES, Place
from tiny import make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("keys") / "shapes", num_train=16, num_val=4, image_size=(40, 90))


# It waits for workers that cannot start, and for the job's end.
SLOW = {"train.start_timeout_s": pytest.mark.slow}


@pytest.mark.parametrize("key", [pytest.param(key, marks=SLOW.get(key, ())) for key in RAY_CASES])
def test_key_does_what_it_says(key: str, dataset: Path, tmp_path: Path) -> None:
    RAY_CASES[key](Place(dataset, tmp_path))
