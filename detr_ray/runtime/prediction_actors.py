"""How many actors a prediction gets, and what each of them takes.

A GPU is one actor's. On CPUs, many actors with a thread each do more than few with many threads: what a model does one
after the other (small maps, single images, Python itself) leaves further threads of its process without work. So unless
``train.num_workers`` says how many, there is one for each CPU that is left beside the data tasks, as far as there is
memory for them; cores that have none get to those that there are, as threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detr_ray.config import Config
from detr_ray.prediction.job import PredictionJob
from detr_ray.runtime.resources import plan_workers, usable_nodes
from detr_ray.runtime.session import is_own_ray
from detr_ray.runtime.trainer import threads_given

CPUS_A_DATA_TASK = 8
"""Of so many CPUs one is left to data tasks."""
PROCESS_BYTES = 1 << 30
"""Memory of an actor beside the weights and what it computes."""
BYTES_A_PIXEL = {"detr": 600}
MOST_BYTES_A_PIXEL = 1500
"""Memory that the forward pass takes for each pixel of a batch: of an architecture with one feature map, and at most,
with the maps and queries of DINO. 360 and 1,320 were measured with a ResNet-50."""


@dataclass(frozen=True)
class Actors:
    """The processes that run the model.

    Attributes:
        count: how many.
        threads: threads of torch in each.
        use_gpu: whether each has a GPU.
        num_cpus: CPUs that each takes of its node.
        custom: custom resources that each takes of its node.
        tasks: most data tasks at the same time, in all.
    """

    count: int
    threads: int
    use_gpu: bool
    num_cpus: float
    custom: Mapping[str, float]
    tasks: int


def plan_actors(config: Config, job: PredictionJob, batches: int) -> Actors:
    """Plans the actors of a prediction for the cluster that this process is connected to.

    Args:
        config: says how many workers, whether with GPUs, and how many data tasks each.
        job: what is predicted.
        batches: how many of its batches; no more actors than these are of use.

    Raises:
        ConfigError: the cluster has no room for them.
    """
    request = plan_workers(config, trains=False)
    custom = {name: amount for name, amount in request.resources_per_worker.items() if name not in ("CPU", "GPU")}
    nodes = [node.total if is_own_ray() else node.free for node in usable_nodes()]
    rooms = [_room(node) for node in nodes if all(node.get(name, 0) >= amount for name, amount in custom.items())]
    asked = request.max_workers if request.use_gpu or config.train.worker_range is not None else None
    count, threads = share_out(rooms, asked, memory_needed(job), batches)
    return Actors(
        count=count,
        threads=threads_given() or threads,
        use_gpu=request.use_gpu,
        num_cpus=0 if request.use_gpu else threads,
        custom=custom,
        tasks=request.tasks_per_worker * count,
    )


def memory_needed(job: PredictionJob) -> int:
    """Bytes that an actor on CPUs takes at most."""
    height, width = job.batches[0][0].size
    pixels = height * width * max(map(len, job.batches))
    weights = sum(value.nbytes for value in job.saved.checkpoint["model"].values())
    assert job.saved.config is not None
    a_pixel = BYTES_A_PIXEL.get(job.saved.config.model.architecture, MOST_BYTES_A_PIXEL)
    return int(PROCESS_BYTES + 2 * weights + a_pixel * pixels)


@dataclass(frozen=True)
class Room:
    """What a node has for actors.

    Attributes:
        cpus: Ray's CPUs on it.
        cores: those of them that are cores; a Ray of our own may have one more, so that data tasks have one.
        memory: bytes.
    """

    cpus: int
    cores: int
    memory: float


def share_out(rooms: Sequence[Room], asked: int | None, memory: int, batches: int) -> tuple[int, int]:
    """Shares out the CPUs of a cluster.

    Args:
        rooms: what its nodes have.
        asked: how many actors are wanted; None for one a CPU, as far as there is memory.
        memory: bytes that each takes.
        batches: most actors that are of use.

    Returns:
        The number of actors, and the threads of each: the most for which the nodes have room for all actors.
    """
    cores = sum(room.cores for room in rooms)
    for_actors = min(cores, sum(room.cpus for room in rooms) - max(1, cores // CPUS_A_DATA_TASK))
    if asked is None:
        fitting = sum(int(min(room.cores, room.memory // memory)) for room in rooms)
        asked = max(1, min(for_actors, fitting))
    count = min(asked, batches)
    threads = max(1, for_actors // count)
    while threads > 1 and sum(room.cores // threads for room in rooms) < count:
        threads -= 1
    return count, threads


def _room(node: Mapping[str, float]) -> Room:
    cpus = int(node.get("CPU", 0))
    is_here = is_own_ray() and hasattr(os, "sched_getaffinity")
    return Room(cpus, min(cpus, len(os.sched_getaffinity(0))) if is_here else cpus, node.get("memory", math.inf))
