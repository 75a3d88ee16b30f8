"""The number of workers of a run: its request, compared with the resources of the cluster.

A request that is larger than the cluster is refused, unless an autoscaler may add nodes: then the run waits for them,
up to ``train.start_timeout_s``. All resources of a worker must be on one node, so room is counted node by node. If two
nodes have a GPU and two other nodes have the custom resource, there is no room for a worker that needs both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ray
import ray.train

from detr_ray.config import Config, ConfigError
from detr_ray.engine.hooks import Budget
from detr_ray.printable import counted
from detr_ray.runtime.ray_internals import autoscaler_adds_nodes, draining_nodes, free_resources

_MOST_NODES_NAMED = 8
REPORTS_WITHIN_S = 6.0


@dataclass(frozen=True)
class Node:
    """A node that work can be placed on.

    Attributes:
        name: Ray's name, with a part of the id if several nodes have the same name.
        node_id: Ray's id.
        total: its resources.
        free: the part of them that is not in use.
    """

    name: str
    node_id: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class WorkerRequest:
    """Workers that a run asks the cluster for.

    Attributes:
        min_workers: the run does not start with fewer.
        max_workers: the run never takes more.
        use_gpu: whether each worker takes a GPU.
        resources_per_worker: resources that each worker takes on its node.
        tasks_per_worker: largest number of concurrent data tasks of each worker.
    """

    min_workers: int
    max_workers: int
    use_gpu: bool
    resources_per_worker: dict[str, float]
    tasks_per_worker: int = 1

    def scaling_config(self, resize_check_s: float) -> ray.train.ScalingConfig:
        """The request as Ray Train takes it.

        Args:
            resize_check_s: seconds between two checks whether there is room for more workers.
        """
        fixed = self.min_workers == self.max_workers
        return ray.train.ScalingConfig(
            num_workers=self.min_workers if fixed else (self.min_workers, self.max_workers),
            use_gpu=self.use_gpu,
            resources_per_worker=dict(self.resources_per_worker),
            **({} if fixed else {"elastic_resize_monitor_interval_s": float(resize_check_s)}),
        )

    def missing(self) -> str:
        """One line that says what is missing for the least number of workers; empty if there is room for them now."""
        nodes = usable_nodes()
        room = self.room(node.free for node in nodes)
        if room >= self.min_workers:
            return ""
        line = (
            f"room for {room} of {counted(self.min_workers, 'worker')} now, which {_need(self.min_workers)} "
            f"{self.needs(self.min_workers)}; free: {self._list(nodes)}"
        )
        if self.room(node.total for node in nodes) >= self.min_workers:
            return f"{line}; what runs or is being started, also by this job, holds the rest"
        return f"{line}; the autoscaler may add nodes" if autoscaler_adds_nodes() else line

    def needs(self, workers: int) -> str:
        """The resources of a number of workers and their data tasks, as text."""
        parts = [_amount(workers * amount, name) for name, amount in self.resources_per_worker.items()]
        more = "one more" if "CPU" in self.resources_per_worker else "one CPU"
        return f"{', '.join(parts)} and {more} for data tasks"

    def refuse_impossible(self) -> None:
        """Compares the least number of workers with all resources of the cluster, also those in use.

        Raises:
            ConfigError: there is no room for them, and no autoscaler that could add nodes.
        """
        nodes = usable_nodes()
        room = self.room(node.total for node in nodes)
        if room >= self.min_workers or autoscaler_adds_nodes(REPORTS_WITHIN_S):
            return
        message = (
            f"train.num_workers: {counted(self.min_workers, 'worker')} {_need(self.min_workers)} "
            f"{self.needs(self.min_workers)}; the cluster has {self._sum(nodes)} "
            f"({counted(len(nodes), 'node')}: {self._list(nodes, 'total')})"
        )
        if len(nodes) > 1 or room:
            each = ", ".join(_amount(amount, name) for name, amount in self.resources_per_worker.items())
            message += f", which is room for {room} (each takes {each} of one node)"
        raise ConfigError(f"{message}; ask for fewer workers, or add nodes")

    def room(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers have room on nodes with these resources, with one CPU left for data tasks."""
        bundle, cpus, workers = self.resources_per_worker, 0.0, 0
        for resources in nodes:
            cpus += resources.get("CPU", 0)
            workers += int(min(resources.get(name, 0) // amount for name, amount in bundle.items()))
        if cpus < 1:
            return 0
        return min(workers, int((cpus - 1) // bundle["CPU"])) if "CPU" in bundle else workers

    def _names(self) -> list[str]:
        return [*self.resources_per_worker, *([] if "CPU" in self.resources_per_worker else ["CPU"])]

    def _shape(self, resources: Mapping[str, float]) -> str:
        return " + ".join(_amount(resources.get(name, 0), name) for name in self._names())

    def _sum(self, nodes: Iterable[Node]) -> str:
        totals = Counter[str]()
        for node in nodes:
            totals.update({name: node.total.get(name, 0) for name in self._names()})
        if self._names() == ["CPU"]:
            return f"{totals['CPU']:g}"
        return ", ".join(_amount(totals[name], name) for name in self._names())

    def _list(self, nodes: list[Node], kind: str = "free") -> str:
        """The nodes with their amounts of the requested resources; many nodes are counted by equal amounts."""
        shapes = [self._shape(getattr(node, kind)) for node in nodes]
        if len(nodes) <= _MOST_NODES_NAMED:
            return ", ".join(f"{node.name} {shape}" for node, shape in zip(nodes, shapes, strict=True))
        return ", ".join(f"{count} with {shape}" for shape, count in Counter(shapes).most_common())


def plan_workers(
    config: Config,
    budget: Budget = Budget(),  # noqa: B008 - it is frozen
    *,
    trains: bool = True,
) -> WorkerRequest:
    """Workers for a run, from its configuration and the cluster that this process is connected to.

    Args:
        config: the configuration.
        budget: largest resources that the run may take.
        trains: whether they take steps together, so that each needs an image of every step.

    Raises:
        ConfigError: there is no room for them, they exceed the budget, or a step has fewer images than workers.
    """
    nodes = usable_nodes()
    use_gpu = _use_gpu(config, nodes, budget)
    bundle = {"GPU" if use_gpu else "CPU": 1.0}
    if config.train.worker_resource is not None:
        bundle[config.train.worker_resource] = 1.0
    asked = budget.worker_range or config.train.worker_range
    least, most = asked or _count_workers(use_gpu, bundle, nodes)
    affordable = _affordable_workers(use_gpu, budget)
    if affordable is not None:
        if least > affordable and (asked or affordable < 1):
            raise ConfigError(
                f"train.num_workers: {counted(least, 'worker')} would take more than this run's budget of "
                f"{_amount(budget.gpus or 0, 'GPU') if use_gpu else _amount(budget.cpus or 0, 'CPU')}, which is "
                f"enough for {affordable}"
            )
        least, most = min(least, affordable), min(most, affordable)
    request = WorkerRequest(least, most, use_gpu, bundle, _data_tasks(config, budget, use_gpu, most))
    request.refuse_impossible()
    if trains and least > config.train.global_batch_size:
        raise ConfigError(
            f"train.num_workers: {least} workers for train.global_batch_size={config.train.global_batch_size} "
            "leave some without an image; ask for fewer workers or a larger batch"
        )
    return request


def usable_nodes() -> list[Node]:
    """The nodes that new work can be placed on: alive, and not being drained."""
    leaving = draining_nodes()
    free = free_resources()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    times = Counter(node["NodeName"] for node in nodes)
    return [
        Node(
            node["NodeName"] if times[node["NodeName"]] == 1 else f"{node['NodeName']} ({node['NodeID'][-6:]})",
            node["NodeID"],
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in sorted(nodes, key=lambda node: (node["NodeName"], node["NodeID"]))
    ]


def _use_gpu(config: Config, nodes: list[Node], budget: Budget) -> bool:
    there = any(node.total.get("GPU", 0) >= 1 for node in nodes)
    if config.train.use_gpu is None:
        return there and budget.gpus != 0
    if config.train.use_gpu and not there and not autoscaler_adds_nodes(REPORTS_WITHIN_S):
        raise ConfigError("train.use_gpu: true, but the cluster has no GPU (set train.use_gpu=false to train on CPUs)")
    return config.train.use_gpu


def _count_workers(use_gpu: bool, bundle: dict[str, float], nodes: list[Node]) -> tuple[int, int]:
    """The least and the most workers if none are configured: one for each GPU, or one on CPUs."""
    if not use_gpu:
        return 1, 1
    room = WorkerRequest(1, 1, use_gpu, bundle).room(node.total for node in nodes)
    if room == 0 and autoscaler_adds_nodes(REPORTS_WITHIN_S):
        raise ConfigError(
            "train.num_workers: no GPU worker has room in the cluster now, so one for each GPU would be none; say how "
            "many the autoscaler is to make room for, as train.num_workers=4 or [1, 4]"
        )
    return max(room, 1), max(room, 1)  # if there is no room for this one, it is refused later


def _affordable_workers(use_gpu: bool, budget: Budget) -> int | None:
    """The number of workers that a budget allows; None without a limit."""
    if use_gpu:
        return budget.gpus
    return None if budget.cpus is None else max(0, budget.cpus - 1)


def _data_tasks(config: Config, budget: Budget, use_gpu: bool, workers: int) -> int:
    """Number of concurrent data tasks of a worker: the configured one, or fewer because of the budget."""
    if budget.cpus is None:
        return config.data.tasks_per_worker
    left = budget.cpus - (0 if use_gpu else workers)
    return max(1, min(config.data.tasks_per_worker, left // max(workers, 1)))


def _need(number: int) -> str:
    return "needs" if number == 1 else "need"


def _amount(amount: float, resource: str) -> str:
    """An amount of a resource as text; CPU and GPU have a plural."""
    return f"{amount:g} {resource}" + ("s" if resource in ("CPU", "GPU") and amount != 1 else "")
