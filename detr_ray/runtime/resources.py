"""How many workers a run gets: what it asks for, held against what the cluster has and what its autoscaler can add.

A worker runs on one node, so room is counted node by node: two nodes with a GPU and two with the custom resource are
room for none that needs both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ray
import ray.train

from detr_ray.config import Config, ConfigError
from detr_ray.runtime.autoscaler import Autoscaler, find_autoscaler
from detr_ray.runtime.ray_internals import draining_nodes, free_resources

_MOST_NODES_NAMED = 8


@dataclass(frozen=True)
class Node:
    """A node that work can be placed on.

    Attributes:
        name: as Ray shows it, with a part of the id where several have one name.
        node_id: Ray's id.
        total: its resources.
        free: those of them that nothing uses now.
    """

    name: str
    node_id: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class WorkerRequest:
    """Workers that a run asks the cluster for.

    Attributes:
        min_workers: with fewer it does not run.
        max_workers: it never takes more.
        use_gpu: whether each takes a GPU.
        resources_per_worker: what each takes, of one node.
        autoscaler: what may add nodes for them.
    """

    min_workers: int
    max_workers: int
    use_gpu: bool
    resources_per_worker: dict[str, float]
    autoscaler: Autoscaler | None = None

    def scaling_config(self, resize_check_s: float) -> ray.train.ScalingConfig:
        """The request in Ray Train's words.

        Args:
            resize_check_s: seconds between two looks at whether more workers have room.
        """
        fixed = self.min_workers == self.max_workers
        return ray.train.ScalingConfig(
            num_workers=self.min_workers if fixed else (self.min_workers, self.max_workers),
            use_gpu=self.use_gpu,
            resources_per_worker=dict(self.resources_per_worker),
            **({} if fixed else {"elastic_resize_monitor_interval_s": float(resize_check_s)}),
        )

    def missing(self) -> str:
        """One line about what the least number of workers still waits for; empty where all have room now."""
        nodes = usable_nodes()
        room = self.room(node.free for node in nodes)
        if room >= self.min_workers:
            return ""
        line = (
            f"room for {room} of {_count(self.min_workers, 'worker')} now, which {_need(self.min_workers)} "
            f"{self.needs(self.min_workers)}; free: {self._list(nodes)}"
        )
        added = self._addable()
        if added:
            return f"{line}; {added}"
        if self.room(node.total for node in nodes) >= self.min_workers:
            return f"{line}; what runs or is being started, also by this job, holds the rest"
        return line

    def needs(self, workers: int) -> str:
        """What a number of workers takes, with what their data tasks need beside them."""
        parts = [_amount(workers * amount, name) for name, amount in self.resources_per_worker.items()]
        more = "one more" if "CPU" in self.resources_per_worker else "one CPU"
        return f"{', '.join(parts)} and {more} for data tasks"

    def refuse_impossible(self) -> None:
        """Holds the least number of workers against all that there is and could be.

        Raises:
            ConfigError: there can never be room for them.
        """
        nodes = usable_nodes()
        room = self.room(node.total for node in nodes)
        if room >= self.min_workers or (self.autoscaler is not None and self.autoscaler.node_types is None):
            return
        most = self.room([*(node.total for node in nodes), *self._additions()])
        if most >= self.min_workers:
            return
        message = (
            f"train.num_workers: {_count(self.min_workers, 'worker')} {_need(self.min_workers)} "
            f"{self.needs(self.min_workers)}; the cluster has {self._sum(nodes)} "
            f"({_count(len(nodes), 'node')}: {self._list(nodes, 'total')})"
        )
        if len(nodes) > 1 or most:
            each = ", ".join(_amount(amount, name) for name, amount in self.resources_per_worker.items())
            message += f", which is room for {room} (each takes {each} of one node)"
        if self.autoscaler is not None:
            added = self._addable()
            message += f"; {added}, which would be room for {most}" if added else "; the autoscaler cannot add to it"
        raise ConfigError(f"{message}; ask for fewer workers, or add nodes")

    def room(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers these nodes hold, with a CPU left for data tasks."""
        bundle, cpus, workers = self.resources_per_worker, 0.0, 0
        for resources in nodes:
            cpus += resources.get("CPU", 0)
            workers += int(min(resources.get(name, 0) // amount for name, amount in bundle.items()))
        if cpus < 1:
            return 0
        return min(workers, int((cpus - 1) // bundle["CPU"])) if "CPU" in bundle else workers

    def _additions(self) -> list[Mapping[str, float]]:
        """The resources of each node that the autoscaler could add, those first that hold the most workers."""
        if self.autoscaler is None:
            return []
        enough = self.max_workers + 1  # more of one type are of no use
        nodes = [kind.resources for kind in self.autoscaler.addable() for _ in range(min(kind.most, enough))]
        nodes.sort(key=lambda one: -min(one.get(name, 0) // need for name, need in self.resources_per_worker.items()))
        return nodes[: self.autoscaler.nodes_left()]

    def _addable(self) -> str:
        """What the autoscaler can add, in words."""
        if self.autoscaler is None:
            return ""
        if self.autoscaler.node_types is None:
            return "what the autoscaler can add is not known here"
        kinds, left = self.autoscaler.addable(), self.autoscaler.nodes_left()
        if not kinds or left == 0:
            return ""
        names = ", ".join(f"{_count(kind.most, 'node')} {kind.name} ({self._shape(kind.resources)})" for kind in kinds)
        limit = (
            f", {_count(left, 'node')} in all" if left is not None and left < sum(kind.most for kind in kinds) else ""
        )
        return f"the autoscaler can add {names}{limit}"

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
        """The nodes with what they have of what counts here; many as numbers of like ones."""
        shapes = [self._shape(getattr(node, kind)) for node in nodes]
        if len(nodes) <= _MOST_NODES_NAMED:
            return ", ".join(f"{node.name} {shape}" for node, shape in zip(nodes, shapes, strict=True))
        return ", ".join(f"{count} with {shape}" for shape, count in Counter(shapes).most_common())


def plan_workers(config: Config) -> WorkerRequest:
    """Workers for a run, from its configuration and the cluster that this process is connected to.

    Raises:
        ConfigError: there can never be room for them, or some would have no image.
    """
    nodes, autoscaler = usable_nodes(), find_autoscaler()
    use_gpu = _use_gpu(config, nodes, autoscaler)
    bundle = {"GPU" if use_gpu else "CPU": 1.0}
    if config.train.worker_resource is not None:
        bundle[config.train.worker_resource] = 1.0
    least, most = config.train.worker_range or _count_workers(use_gpu, bundle, nodes, autoscaler)
    request = WorkerRequest(least, most, use_gpu, bundle, autoscaler)
    request.refuse_impossible()
    if least > config.train.global_batch_size:
        raise ConfigError(
            f"train.num_workers: {least} workers for train.global_batch_size={config.train.global_batch_size} "
            "leave some without an image; ask for fewer workers or a larger batch"
        )
    return request


def usable_nodes() -> list[Node]:
    """The nodes that new work can be placed on: alive, and not about to leave."""
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


def _use_gpu(config: Config, nodes: list[Node], autoscaler: Autoscaler | None) -> bool:
    there = any(node.total.get("GPU", 0) >= 1 for node in nodes)
    kinds = autoscaler.node_types if autoscaler is not None else ()
    could_be = kinds is not None and any(kind.resources.get("GPU", 0) >= 1 and kind.most > 0 for kind in kinds)
    if config.train.use_gpu is None:
        return there or could_be
    if config.train.use_gpu and not there and not could_be and kinds is not None:
        raise ConfigError("train.use_gpu: true, but the cluster has no GPU (set train.use_gpu=false to train on CPUs)")
    return config.train.use_gpu


def _count_workers(
    use_gpu: bool, bundle: dict[str, float], nodes: list[Node], autoscaler: Autoscaler | None
) -> tuple[int, int]:
    """Workers where the configuration leaves it to the cluster."""
    if not use_gpu:
        return 1, 1
    room = WorkerRequest(1, 1, use_gpu, bundle).room(node.total for node in nodes)
    if room == 0 and autoscaler is None:
        return 1, 1  # and refused
    if room == 0:
        raise ConfigError(
            "train.num_workers: no GPU worker has room in the cluster now, so one for each GPU would be none; say how "
            "many the autoscaler is to make room for, as train.num_workers=4 or [1, 4]"
        )
    return room, room


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _need(number: int) -> str:
    return "needs" if number == 1 else "need"


def _amount(amount: float, resource: str) -> str:
    """An amount of a resource; those that Ray knows have a plural."""
    return f"{amount:g} {resource}" + ("s" if resource in ("CPU", "GPU") and amount != 1 else "")
