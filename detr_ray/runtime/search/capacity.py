"""The number of concurrent trials that a cluster has resources for, so that no trial waits for another one.

A trial's workers are placed together or not at all (a placement group), so trials cannot hold half of their resources.
But workers that take all CPUs would leave none for data tasks, and wait for them for ever. So each trial counts with
its workers and one CPU for data tasks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping

import ray

from detr_ray.config import Config, ConfigError
from detr_ray.engine.hooks import Budget
from detr_ray.runtime.cluster_address import cluster_address
from detr_ray.runtime.ray_internals import autoscaler_adds_nodes
from detr_ray.runtime.resources import WorkerRequest, plan_workers, usable_nodes
from detr_ray.runtime.search.session import most_workers, trials_on_this_machine
from detr_ray.search.reading import POPULATIONS

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


def trials_at_once(request: WorkerRequest, nodes: Iterable[Mapping[str, float]]) -> int:
    """The number of concurrent trials on these nodes.

    An elastic trial counts with its most workers: it may grow to them, and no other would have room then. If there is
    room only for fewer, one trial runs at a time.

    Args:
        request: the workers of one trial.
        nodes: resources of each node.
    """
    nodes = list(nodes)
    bundle = request.resources_per_worker
    workers = sum(int(min(node.get(name, 0) // amount for name, amount in bundle.items())) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)

    def room(each: int) -> int:
        return int(min(workers // each, cpus // (each * bundle.get("CPU", 0) + 1)))

    return max(room(request.max_workers), min(1, room(request.min_workers)))


def capacity_for(config: Config) -> Capacity:
    """The capacity of the present cluster for the trials of a search.

    Raises:
        ConfigError: a trial has no room, or not all trials of a population at the same time.
    """
    settings = config.tune
    population = settings.scheduler in POPULATIONS
    most = settings.max_concurrent  # the cluster's resources matter beside it
    if cluster_address() is None and not population:
        most = trials_on_this_machine(config, most_workers(config))
    capacity = Capacity(config, Budget(), most, settings.trials)
    if population:
        capacity.refuse_scattered(settings.trials)
    return capacity


class Capacity:
    """Decides whether one more trial has room; requests nodes from an autoscaler, if there is one.

    Args:
        config: of a trial.
        budget: of a trial.
        most: largest number of concurrent trials; None for no limit.
        wanted: number of trials.

    Raises:
        ConfigError: a trial has no room in this cluster.
    """

    def __init__(self, config: Config, budget: Budget, most: int | None, wanted: int) -> None:
        self._request = plan_workers(config, budget)
        self._most = most
        self._wanted = wanted if most is None else min(most, wanted)
        self._room = 0
        self._looked = -LOOK_EVERY_S
        self._asked_for = 0  # trials for which nodes are requested

    @property
    def room(self) -> int:
        """The number of concurrent trials on the present nodes."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._room = trials_at_once(self._request, (node.total for node in usable_nodes()))
        return self._room if self._most is None else min(self._room, self._most)

    def budget(self, config: Config) -> Budget:
        """The resources of each trial: workers as configured, one CPU for data tasks, and its share of the cores."""
        workers = most_workers(config) * max(1, min(self.room, config.tune.trials))
        cores = ray.cluster_resources().get("CPU", 1.0) if cluster_address() is not None else (os.cpu_count() or 1)
        return Budget(threads=max(1, int(cores // workers)))

    @property
    def grows(self) -> bool:
        """Whether an autoscaler may add nodes."""
        return bool(autoscaler_adds_nodes(LOOK_EVERY_S))

    @property
    def needs(self) -> str:
        """The resources of a trial, as text."""
        return self._request.needs(self._request.max_workers)

    def has_room(self, running: int) -> bool:
        """Whether another trial can run beside the running ones."""
        if running < self.room:
            return True
        self._ask_for_nodes()
        return False

    def want(self, trials: int) -> None:
        """Notes how many trials are left. With them, what is requested of an autoscaler becomes less: idle nodes go.

        Args:
            trials: those that run, and those that will.
        """
        self._wanted = trials if self._most is None else min(self._most, trials)
        if self._asked_for > self._wanted:
            self._request_nodes(self._wanted)

    def refuse_scattered(self, trials: int) -> None:
        """Refuses trials that are to run at the same time and have no room, unless an autoscaler may add nodes.

        Raises:
            ConfigError: they have none.
        """
        if self.room < trials and not self.grows:
            raise ConfigError(
                f"tune.trials: the trials of a population train at the same time, and {self.room} of {trials} have "
                f"room here (each takes {self.needs}); ask for fewer, or for fewer train.num_workers (of a range the "
                "most count)"
            )

    def _ask_for_nodes(self) -> None:
        """Requests resources for all concurrent trials from an autoscaler, once."""
        if not self._asked_for and self._room < self._wanted and autoscaler_adds_nodes():
            self._request_nodes(self._wanted)

    def _request_nodes(self, trials: int) -> None:
        from ray.autoscaler.sdk import request_resources

        bundle = self._request.resources_per_worker
        trial = [*(dict(bundle) for _ in range(self._request.max_workers)), {"CPU": 1}]
        request_resources(bundles=trial * trials)
        self._asked_for = trials

    def end(self) -> None:
        """Withdraws the request to the autoscaler."""
        if self._asked_for and ray.is_initialized():
            self._request_nodes(0)
