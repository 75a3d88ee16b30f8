"""How many trials have room at the same time, so that none waits for what another one holds.

A trial's workers are placed together or not at all (a placement group), so trials cannot hold half of what they need.
But workers that take all CPUs would leave none for data tasks, for which they would wait for ever. So each trial counts
with its workers and one CPU for data tasks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

import ray

from detr_ray.config import Config
from detr_ray.engine.hooks import Budget
from detr_ray.runtime.ray_internals import autoscaler_adds_nodes
from detr_ray.runtime.resources import WorkerRequest, plan_workers, usable_nodes

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


def trials_at_once(request: WorkerRequest, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many trials these nodes hold.

    Args:
        request: the workers of one trial.
        nodes: resources of each node.
    """
    nodes = list(nodes)
    bundle = request.resources_per_worker
    workers = sum(int(min(node.get(name, 0) // amount for name, amount in bundle.items())) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    cpus_a_trial = request.min_workers * bundle.get("CPU", 0) + 1
    return int(min(workers // request.min_workers, cpus // cpus_a_trial))


class Capacity:
    """Says whether one more trial has room; asks an autoscaler for room where there is one.

    Args:
        config: of a trial.
        budget: of a trial.
        most: most trials at the same time; None for no limit.
        wanted: number of trials that are left to run.

    Raises:
        ConfigError: a trial has no room in this cluster.
    """

    def __init__(self, config: Config, budget: Budget, most: int | None, wanted: int) -> None:
        self._request = plan_workers(config, budget)
        self._most = most
        self._wanted = wanted if most is None else min(most, wanted)
        self._room = 0
        self._looked = -LOOK_EVERY_S
        self._asked_for_nodes = False

    @property
    def room(self) -> int:
        """How many trials have room now, of the nodes that are there."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._room = trials_at_once(self._request, (node.total for node in usable_nodes()))
        return self._room if self._most is None else min(self._room, self._most)

    @property
    def grows(self) -> bool:
        """Whether an autoscaler may make more room."""
        return bool(autoscaler_adds_nodes(LOOK_EVERY_S))

    @property
    def needs(self) -> str:
        """What a trial takes, in words."""
        return self._request.needs(self._request.min_workers)

    def has_room(self, running: int) -> bool:
        """Whether another trial can run beside so many."""
        if running < self.room:
            return True
        self._ask_for_nodes()
        return False

    def _ask_for_nodes(self) -> None:
        """Has an autoscaler make room for all trials that are wanted at once."""
        if self._asked_for_nodes or self._room >= self._wanted or not autoscaler_adds_nodes():
            return
        from ray.autoscaler.sdk import request_resources

        trial = [dict(self._request.resources_per_worker) for _ in range(self._request.min_workers)] + [{"CPU": 1}]
        request_resources(bundles=trial * self._wanted)
        self._asked_for_nodes = True

    def end(self) -> None:
        """Takes back what the autoscaler was asked for."""
        if self._asked_for_nodes and ray.is_initialized():
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[])
