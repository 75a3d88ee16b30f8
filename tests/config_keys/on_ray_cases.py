"""Keys that mean something on Ray alone. A Ray is running when these cases are called, and nothing else on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from config_keys.registry import Place, shows
from ray.train.torch import TorchTrainer

from detr_ray.engine.errors import RunFailed
from detr_ray.runtime import datasets
from detr_ray.runtime.datasets import RayBatches
from detr_ray.runtime.launch import fit
from detr_ray.runtime.search.search import run_search


class Started(Exception):
    """Raised in place of starting workers."""


def asked_of_ray_train(place: Place, *overrides: str) -> dict[str, Any]:
    """What Ray Train is asked for when a run starts, up to its trainer."""
    asked: dict[str, Any] = {}

    def note(self: TorchTrainer, *arguments: Any, **named: Any) -> None:
        asked.update(named)
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTrainer, "__init__", note)
        with pytest.raises(Started):
            fit(place.config("train.launcher=ray", *overrides))
    return asked


@shows("train.num_workers", on_ray=True)
def num_workers(place: Place) -> None:
    assert asked_of_ray_train(place)["scaling_config"].num_workers == 1
    assert asked_of_ray_train(place, "train.num_workers=2")["scaling_config"].num_workers == 2
    assert asked_of_ray_train(place, "train.num_workers=[1, 2]")["scaling_config"].num_workers == (1, 2)


@shows("train.worker_resource", on_ray=True)
def worker_resource(place: Place) -> None:
    """The first node of each Ray has a resource of its own."""
    of_head = "node:__internal_head__"
    found = [
        dict(asked_of_ray_train(place, *key)["scaling_config"].resources_per_worker)
        for key in ((), (f"train.worker_resource={of_head}",))
    ]
    assert found == [{"CPU": 1}, {"CPU": 1, of_head: 1}]


@shows("train.max_failures", on_ray=True)
def max_failures(place: Place) -> None:
    """That Ray Train then starts workers again so often: ``tests/runtime/test_faults.py``."""
    asked = asked_of_ray_train(place, "train.max_failures=7")
    assert asked["run_config"].failure_config.max_failures == 7


@shows("train.stall_timeout_s", on_ray=True)
def stall_timeout_s(place: Place) -> None:
    """Those that wait for a worker wait longer than it may take; that it is ended: ``tests/runtime``."""
    waits = [asked_of_ray_train(place, f"train.stall_timeout_s={s}")["torch_config"].timeout_s for s in (50, 500)]
    assert waits[0] > 50 and waits[1] - waits[0] == 450


@shows("train.resize_check_s", on_ray=True)
def resize_check_s(place: Place) -> None:
    asked = asked_of_ray_train(place, "train.num_workers=[1, 2]", "train.resize_check_s=7")
    assert asked["scaling_config"].elastic_resize_monitor_interval_s == 7


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
class Squatter:
    """Takes a CPU."""

    def is_there(self) -> bool:
        return True


@shows("train.start_timeout_s", on_ray=True)
def start_timeout_s(place: Place) -> None:
    """Something else has all CPUs."""
    squatters = [Squatter.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    try:
        ray.get([squatter.is_there.remote() for squatter in squatters], timeout=120)
        started = time.monotonic()
        with pytest.raises(RunFailed, match=r"train\.start_timeout_s=2: room for 0 of 1 worker now"):
            fit(place.config("train.launcher=ray", "train.start_timeout_s=2"))
        assert time.monotonic() - started < 120, "the default is half an hour"
    finally:
        for squatter in squatters:
            ray.kill(squatter)


def of_planned_batches(place: Place, look: Callable[[Any], None], *overrides: str) -> None:
    """Looks at a worker's training batches, made by data tasks."""
    data = place.job("train.global_batch_size=1", "train.epochs=4", *overrides).data
    batches = RayBatches(data, ray.put(data), 1, 0).train_batches(0, 32)
    try:
        look(batches)
    finally:
        batches.close()  # type: ignore[attr-defined]


@shows("data.tasks_per_worker", on_ray=True)
def tasks_per_worker(place: Place) -> None:
    """Ray Data may use so many CPUs at a time for a worker."""
    limits = []
    iterate = ray.data.Dataset.iter_batches

    def note(self: Any, **named: Any) -> Any:
        limits.append(self.context.execution_options.resource_limits.cpu)
        return iterate(self, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data.Dataset, "iter_batches", note)
        for tasks in (1, 3):
            of_planned_batches(place, next, f"data.tasks_per_worker={tasks}")
    assert limits == [1, 3]


@shows("data.prefetch_batches", on_ray=True)
def prefetch_batches(place: Place) -> None:
    """So many are ready beside the one that is taken, and no more, however long it takes."""
    ready: list[int] = []
    read = datasets.from_table

    def note(table: Any) -> Any:
        ready[-1] += 1
        return read(table)

    def take_one_and_wait(most: int) -> Callable[[Any], None]:
        def look(batches: Any) -> None:
            next(batches)
            give_up = time.monotonic() + 60
            while ready[-1] < most and time.monotonic() < give_up:
                time.sleep(0.1)
            time.sleep(1.0)

        return look

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "from_table", note)
        for ahead in (1, 6):
            ready.append(0)
            of_planned_batches(place, take_one_and_wait(ahead + 2), f"data.prefetch_batches={ahead}")
    # The one that was taken, those that wait, and one for which there is no place yet.
    assert ready == [3, 8]


@shows("tune.time_budget_s", on_ray=True)
def time_budget_s(place: Place) -> None:
    """Trials that would train for ever stop with a checkpoint, and no more are started."""
    said: list[str] = []
    rates = "tune.space={optim.lr: {loguniform: [1e-5, 1e-3]}}"
    config = place.config(
        rates, "tune.trials=3", "tune.max_concurrent=1", "tune.time_budget_s=20", "train.epochs=100000"
    )
    result = run_search(config, said.append)
    assert result.status == "out of time" and result.seconds > 20
    assert [trial.state for trial in result.trials] == ["stopped"], said
    assert any("the time of the search is over (tune.time_budget_s=20)" in line for line in said)
    if result.trials[0].history:
        assert list(Path(result.path).glob("t000/checkpoints/step_*/model.pt"))
