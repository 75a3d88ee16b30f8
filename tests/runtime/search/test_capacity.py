"""How many trials have room at once, for tables of nodes. No Ray runs."""

from __future__ import annotations

import random

import pytest

from detr_ray.runtime.resources import WorkerRequest
from detr_ray.runtime.search.capacity import trials_at_once

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


def test_an_elastic_run_counts_with_its_least_workers() -> None:
    assert trials_at_once(WorkerRequest(1, 4, False, CPU), [{"CPU": 8}]) == 4


def test_trials_that_have_room_never_hold_what_data_tasks_need() -> None:
    """For any cluster: workers find their nodes one by one, and a CPU is left for the data tasks of each trial."""
    chance = random.Random(0)
    for _ in range(500):
        nodes = [{"CPU": float(chance.randint(0, 6))} for _ in range(chance.randint(1, 5))]
        workers = chance.randint(1, 3)
        trials = at_once(workers, CPU, *nodes)
        total = sum(node["CPU"] for node in nodes)
        assert total >= trials * (workers + 1) and total < (trials + 1) * (workers + 1)
