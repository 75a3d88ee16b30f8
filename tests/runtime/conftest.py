"""One Ray for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbing import STEPS, config_file, train


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Ray with enough logical CPUs for two workers and their data tasks; ended after the last test."""
    from detr_ray.runtime.session import ray_session

    with ray_session(num_workers=2, data_tasks=2, use_gpu=False):
        yield


@pytest.fixture(scope="session")
def undisturbed_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, text = train(config_file(dataset, folder, "undisturbed"))
    assert code == 0 and f"finished {STEPS} steps" in text
    return folder / "undisturbed"
