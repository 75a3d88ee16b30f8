"""What the cluster's autoscaler can add, where there is one.

Ray tells a job which nodes there are, not which there could be. That stands in the file that the autoscaler was started
with, on the head's disk, or in Kubernetes' record of the cluster; so a task on the head looks there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private import ray_constants
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HEAD_RESOURCE = "node:__internal_head__"
_NODE_TYPE_LABEL = "ray.io/node-group"
_ANSWER_WITHIN_S = 5.0
# How Ray's monitor names the "types" of nodes that nobody scales.
_NOT_SCALED = "node_"


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler makes.

    Attributes:
        name: as its configuration names it.
        resources: what each such node has.
        most: how many of them there may be.
    """

    name: str
    resources: Mapping[str, float]
    most: int


@dataclass(frozen=True)
class Autoscaler:
    """An autoscaler that works on this cluster.

    Attributes:
        node_types: what it can make; None where that could not be learnt.
        most_nodes: most nodes of all types together, beside the head.
    """

    node_types: tuple[NodeType, ...] | None
    most_nodes: int | None = None

    def addable(self) -> list[NodeType]:
        """The types, each with how many of it could still be added to the nodes that are there now."""
        if self.node_types is None:
            return []
        present = _nodes_by_type()
        left = [NodeType(kind.name, kind.resources, kind.most - present[kind.name]) for kind in self.node_types]
        return [kind for kind in left if kind.most > 0]

    def nodes_left(self) -> int | None:
        """How many nodes of any type could still be added; None where there is no such limit."""
        if self.most_nodes is None or self.node_types is None:
            return None
        present = _nodes_by_type()
        return max(0, self.most_nodes - sum(present[kind.name] for kind in self.node_types))


def find_autoscaler() -> Autoscaler | None:
    """The autoscaler of the cluster that this process is connected to; None where there is none."""
    gcs_address = ray.get_runtime_context().gcs_address
    head = next((node for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"]), None)
    if head is None:
        return None
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return parse_autoscaler(_look_on_head(gcs_address))
    on_head = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_head)(_look_on_head)
    try:
        return parse_autoscaler(ray.get(look.remote(gcs_address), timeout=_ANSWER_WITHIN_S))
    except ray.exceptions.RayError:
        # The head is too busy to say. Whether an autoscaler is there, the cluster's own record says.
        scales = any(not name.startswith(_NOT_SCALED) for name in _reported_types())
        return Autoscaler(None) if scales else None


def parse_autoscaler(config: Mapping[str, Any] | str | None) -> Autoscaler | None:
    """What an autoscaler's configuration means.

    Args:
        config: the configuration; text where there is one that cannot be read; None where there is no autoscaler.
    """
    if config is None:
        return None
    if isinstance(config, str):
        return Autoscaler(None)
    types = config.get("available_node_types") or {}
    # The head is there, once, and no more of it come.
    kinds = {name: kind for name, kind in types.items() if name != config.get("head_node_type")}
    if not types or any(not kind.get("resources") for kind in kinds.values()):
        return Autoscaler(None)  # what such a node has is found out when it starts
    most_nodes = config.get("max_workers")
    return Autoscaler(
        tuple(
            NodeType(name, kind["resources"], kind.get("max_workers", most_nodes or 0)) for name, kind in kinds.items()
        ),
        most_nodes,
    )


def _look_on_head(gcs_address: str) -> dict[str, Any] | str | None:
    """Runs on the head: the configuration of its autoscaler, as `parse_autoscaler` takes it."""
    import psutil  # Ray brings its own

    for process in psutil.process_iter():
        try:
            arguments = dict(part.partition("=")[::2] for part in process.cmdline() if part.startswith("--"))
        except psutil.Error:
            continue
        if "--monitor-ip" not in arguments or arguments.get("--gcs-address") != gcs_address:
            continue
        if "--autoscaling-config" not in arguments:
            return None  # a monitor that only watches
        try:
            config = yaml.safe_load(Path(arguments["--autoscaling-config"]).expanduser().read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f"{arguments['--autoscaling-config']}: {error}"
        return config if isinstance(config, dict) else "not a mapping"
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "RAY_CLUSTER_NAME" not in os.environ:
        return None
    # KubeRay's autoscaler runs in a container of its own, beside a head that has no monitor.
    return _look_in_kubernetes(os.environ["RAY_CLUSTER_NAME"])


def _look_in_kubernetes(cluster: str) -> dict[str, Any] | str:
    """The configuration that KubeRay's autoscaler derives from the cluster's record, by the same means as it."""
    try:
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
        from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

        namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
        record = KubernetesHttpApiClient(namespace=namespace).get(f"rayclusters/{cluster}")
        return _derive_autoscaling_config_from_ray_cr(record)
    except Exception as error:  # the head's account may not be allowed to ask, and none of this is a public interface
        return f"Kubernetes does not tell: {error}"


def _nodes_by_type() -> Counter[str]:
    """How many nodes of each type are there: as their labels say, or the autoscaler does."""
    labels = [node.get("Labels", {}).get(_NODE_TYPE_LABEL) for node in ray.nodes() if node["Alive"]]
    types = Counter[str](label for label in labels if label)
    types |= _reported_types()
    return types


def _reported_types() -> Counter[str]:
    """The types of nodes in the monitor's last report, with their numbers."""
    report = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    summary = json.loads(report).get("autoscaler_report") if report else None
    return Counter((summary or {}).get("active_nodes") or {})
