"""How the CPUs of a cluster are shared out to actors that predict."""

from __future__ import annotations

import math

import pytest

from detr_ray.runtime.prediction_actors import Room, share_out

GIB = 1 << 30


def nodes(*cpus: int, memory: float = math.inf) -> list[Room]:
    return [Room(each, each, memory) for each in cpus]


@pytest.mark.parametrize(
    ("rooms", "asked", "shared"),
    [
        ([Room(3, 2, math.inf)], None, (2, 1)),  # a Ray of our own on two cores has a third CPU, for data tasks
        ([Room(3, 2, math.inf)], 1, (1, 2)),
        ([Room(2, 1, math.inf)], None, (1, 1)),
        (nodes(4), None, (3, 1)),
        (nodes(64), None, (56, 1)),
        (nodes(64, memory=20 * GIB), None, (10, 5)),
        (nodes(8, memory=1 * GIB), None, (1, 7)),
        (nodes(8, 8, 8, 8), 4, (4, 7)),  # no two on one node
        (nodes(16, 16, 64), 3, (3, 21)),  # all three on the large one
        (nodes(0, 0), None, (1, 1)),  # others hold all of it: one that waits
        (nodes(0, 1), 2, (2, 1)),
        (nodes(128), None, (100, 1)),
    ],
)
def test_actors_and_their_threads_follow_from_cpus_and_memory(
    rooms: list[Room], asked: int | None, shared: tuple[int, int]
) -> None:
    assert share_out(rooms, asked, 2 * GIB, batches=100) == shared


def test_there_are_no_more_actors_than_batches() -> None:
    assert share_out(nodes(9), None, 2 * GIB, batches=2) == (2, 4)
