"""Ray's autoscaler on one machine: its configuration, and the provider that starts its nodes.

For `cluster/local.py up --autoscale`.

Ray's own provider of this kind, ``fake_multinode``, is not used: its nodes share one folder, and a new node unpacks a
job's files there again, so that a running job loses its working directory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_cluster import HEAD_TYPE, WORKER_SLOT, WORKER_TYPE, ClusterSpec, LocalCluster
from local_machine import node_address
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

_HEAD_TAGS = {
    TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
    TAG_RAY_USER_NODE_TYPE: HEAD_TYPE,
    TAG_RAY_NODE_NAME: "head",
    TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
}


def autoscaler_config(spec: ClusterSpec, folder: Path) -> dict[str, Any]:
    """Configuration of Ray's autoscaler with `LocalNodeProvider`.

    Args:
        spec: settings of the cluster; with an autoscaler.
        folder: the cluster's folder.
    """
    assert spec.autoscale is not None
    fewest, most = spec.autoscale
    memory = {"object_store_memory": spec.object_store_mb * 1_000_000}
    return {
        "cluster_name": "local",
        "max_workers": most,
        "idle_timeout_minutes": spec.idle_minutes,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": "local_provider.LocalNodeProvider",
            "folder": str(folder),
            "disable_node_updaters": True,  # nothing needs to be installed on a new node
        },
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": spec.head_cpus, **memory}, "node_config": {}, "max_workers": 0},
            WORKER_TYPE: {
                "resources": {"CPU": spec.cpus_per_node, WORKER_SLOT: 1, **memory},
                "node_config": {},
                "min_workers": fewest,
                "max_workers": most,
            },
        },
        # Defaults that `ray up` would fill in.
        **{f"{part}setup_commands": [] for part in ("", "head_", "worker_")},
        **{f"{part}_start_ray_commands": [] for part in ("head", "worker")},
        "initialization_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }


class LocalNodeProvider(NodeProvider):  # type: ignore[misc]
    """Provides nodes of a `LocalCluster`; the id of a node is its name.

    Args:
        provider_config: contains the cluster's ``folder``.
        cluster_name: not used.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._cluster = LocalCluster(Path(provider_config["folder"]))
        self._tags: dict[str, dict[str, str]] = {"head": dict(_HEAD_TAGS)}
        self._lock = threading.RLock()  # nodes are created by several threads

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Names of the running nodes with these tags."""
        with self._lock:
            wanted = [name for name, tags in self._tags.items() if tag_filters.items() <= tags.items()]
            return [name for name in wanted if self.is_running(name)]

    def is_running(self, node_id: str) -> bool:
        """Whether the node's processes run."""
        return self._cluster.is_running(node_id)

    def is_terminated(self, node_id: str) -> bool:
        """Whether the node's processes have ended."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The tags that the autoscaler has set for the node."""
        with self._lock:
            return dict(self._tags[node_id])

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Sets tags of the node."""
        with self._lock:
            self._tags[node_id].update(tags)

    def internal_ip(self, node_id: str) -> str:
        """The node's address."""
        return node_address(node_id)

    external_ip = internal_ip

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Starts nodes."""
        with self._lock:
            for _ in range(count):
                self._tags[self._cluster.launch_node()] = dict(tags)

    def terminate_node(self, node_id: str) -> None:
        """Ends a node."""
        with self._lock:
            self._cluster.end_node(node_id)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Returns the configuration unchanged."""
        return cluster_config
