"""One Ray for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Ray with enough logical CPUs for two workers and their data tasks; ended after the last test."""
    from detr_ray.runtime.session import ray_session

    with ray_session(num_workers=2, data_tasks=2, use_gpu=False):
        yield
