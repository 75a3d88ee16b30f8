"""A Ray of our own: what its processes find when they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from tiny import make_dataset

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


WITHOUT_FILES = """
import resource
from detr_ray import train
from detr_ray.runtime import session
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
raise SystemExit(train.main(["data.root=DATA", "train.num_workers=1"]))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_that_does_not_start_is_an_error_line_that_says_how_busy_the_machine_is(tmp_path: Path) -> None:
    """Its processes cannot open their files; Ray gives up after 30 seconds."""
    make_dataset(tmp_path / "data")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FILES.replace("DATA", str(tmp_path / "data"))],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Ray did not start on this machine: " in line and f"on {os.cpu_count()} cores" in line
    assert "Traceback" not in done.stderr
