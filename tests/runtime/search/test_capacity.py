"""How many trials have room at once, for tables of nodes, and what is requested of an autoscaler. No Ray runs."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import ray
import ray.autoscaler.sdk

from detr_ray.config import Config, ConfigError
from detr_ray.engine.hooks import Budget
from detr_ray.runtime.resources import WorkerRequest
from detr_ray.runtime.search import capacity
from detr_ray.runtime.search.capacity import Capacity, trials_at_once

CPU, GPU = {"CPU": 1.0}, {"GPU": 1.0}


def at_once(workers: int, bundle: dict[str, float], *nodes: dict[str, float]) -> int:
    return trials_at_once(WorkerRequest(workers, workers, "GPU" in bundle, bundle), nodes)


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (1, [{"CPU": 1}], 0),  # nothing is left for data tasks
        (1, [{"CPU": 2}], 1),
        (1, [{"CPU": 3}], 1),
        (1, [{"CPU": 8}], 4),
        (2, [{"CPU": 1}] * 2, 0),
        (2, [{"CPU": 1}] * 3, 1),
        (2, [{"CPU": 1}] * 6, 2),
        (2, [{"CPU": 5}], 1),
        (2, [{"CPU": 6}], 2),
        (4, [{"CPU": 16}, {"CPU": 16}], 6),
        (1, [{"CPU": 0.5}] * 8, 0),  # a worker is on one node
        (1, [], 0),
    ],
)
def test_workers_on_cpus(workers: int, nodes: list[dict[str, float]], expected: int) -> None:
    assert at_once(workers, CPU, *nodes) == expected


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (1, [{"CPU": 8, "GPU": 4}], 4),
        (2, [{"CPU": 8, "GPU": 3}], 1),
        (1, [{"CPU": 2, "GPU": 4}], 2),  # a CPU for the data tasks of each
        (1, [{"CPU": 16}, {"CPU": 4, "GPU": 2}], 2),
        (1, [{"GPU": 4}], 0),
        (2, [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], 1),
        (1, [{"CPU": 64}], 0),
    ],
)
def test_workers_on_gpus(workers: int, nodes: list[dict[str, float]], expected: int) -> None:
    assert at_once(workers, GPU, *nodes) == expected


def test_a_worker_needs_all_of_its_resources_on_one_node() -> None:
    bundle = {"GPU": 1.0, "big": 1.0}
    both, gpus, marked = {"CPU": 8, "GPU": 2, "big": 1}, {"CPU": 8, "GPU": 8}, {"CPU": 8, "big": 8}
    assert at_once(1, bundle, gpus, marked) == 0
    assert at_once(1, bundle, gpus, marked, both) == 1
    assert at_once(1, bundle, {"CPU": 8, "GPU": 2, "big": 2}) == 2


@pytest.mark.parametrize(("cpus", "expected"), [(15, 3), (14, 2), (8, 1), (5, 1), (4, 1), (2, 1), (1, 0)])
def test_an_elastic_run_counts_with_its_most_workers(cpus: int, expected: int) -> None:
    """It may grow to them, and others would wait for room until they fail. With fewer than these, one runs."""
    assert trials_at_once(WorkerRequest(1, 4, False, CPU), [{"CPU": cpus}]) == expected


class Cluster:
    """A cluster with CPUs, and maybe an autoscaler, as `Capacity` sees it.

    Attributes:
        requests: numbers of CPUs that were requested of the autoscaler.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: int, *, grows: bool) -> None:
        self.cpus, self.requests = cpus, list[float]()
        monkeypatch.setattr(capacity, "plan_workers", lambda config, budget: WorkerRequest(2, 2, False, CPU))
        monkeypatch.setattr(capacity, "usable_nodes", lambda: [SimpleNamespace(total={"CPU": self.cpus})])
        monkeypatch.setattr(capacity, "autoscaler_adds_nodes", lambda timeout_s=0.0: grows)
        monkeypatch.setattr(capacity, "LOOK_EVERY_S", 0.0)
        monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", self.request)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)

    def request(self, bundles: list[dict[str, float]]) -> None:
        self.requests.append(sum(bundle["CPU"] for bundle in bundles))

    def capacity(self, most: int | None, wanted: int) -> Capacity:
        return Capacity(Config(), Budget(), most, wanted)


def test_as_many_trials_as_have_room_and_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 7, grows=False)
    free, capped = cluster.capacity(None, 9), cluster.capacity(1, 9)
    assert (free.room, capped.room) == (2, 1)
    assert [free.has_room(running) for running in (0, 1, 2)] == [True, True, False]
    cluster.cpus = 9
    assert free.has_room(2) and not capped.has_room(1), "a node has come"
    assert cluster.requests == [], "there is no autoscaler"
    free.refuse_scattered(3)
    with pytest.raises(ConfigError, match=r"3 of 4 have room here \(each takes 2 CPUs and one more for data tasks\)"):
        free.refuse_scattered(4)


def test_what_is_requested_of_an_autoscaler_becomes_less_as_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 3, grows=True)
    asking = cluster.capacity(5, 8)
    asking.refuse_scattered(5)
    assert asking.has_room(0) and cluster.requests == []
    for _ in range(3):
        assert not asking.has_room(1)
    assert cluster.requests == [15], "for five trials, once"
    for left in (8, 6, 5, 3, 3, 1):
        asking.want(left)
    assert cluster.requests == [15, 9, 3]
    asking.end()
    assert cluster.requests[-1] == 0


def test_trials_that_have_room_never_hold_what_data_tasks_need() -> None:
    """For any cluster: workers find their nodes one by one, and a CPU is left for the data tasks of each trial."""
    chance = random.Random(0)
    for _ in range(500):
        nodes = [{"CPU": float(chance.randint(0, 6))} for _ in range(chance.randint(1, 5))]
        workers = chance.randint(1, 3)
        trials = at_once(workers, CPU, *nodes)
        total = sum(node["CPU"] for node in nodes)
        assert total >= trials * (workers + 1) and total < (trials + 1) * (workers + 1)
