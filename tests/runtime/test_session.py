"""A Ray of our own: what its processes find when they start."""

from __future__ import annotations

import os
import sys

import pytest
import ray

from detr_ray.runtime.session import TRAIN_ENVIRONMENT, warm_data_workers
from detr_ray.runtime.trainer import controller_environment


def process() -> tuple[int, bool]:
    """A data task's process, and whether what data tasks need was imported before."""
    return os.getpid(), "detr_ray.runtime.datasets" in sys.modules


class Starter:
    """Starts tasks from an environment of its own, as Ray Train's controller and workers do."""

    def start_tasks(self) -> list[tuple[int, bool]]:
        return ray.get([ray.remote(process).remote() for _ in range(2)])

    def start_from_another(self) -> list[tuple[int, bool]]:
        from ray.train.v2._internal.constants import get_env_vars_to_propagate

        environment = get_env_vars_to_propagate()
        worker = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(Starter).remote()
        return ray.get(worker.start_tasks.remote())


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_data_tasks_of_training_workers_run_in_the_processes_that_were_warmed() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    warmed = set(ray.get(warm_data_workers(2)))
    environment = controller_environment(TRAIN_ENVIRONMENT)
    controller = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(Starter).remote()
    tasks = ray.get(controller.start_from_another.remote())
    assert all(imported for _, imported in tasks)
    assert {pid for pid, _ in tasks} & warmed
