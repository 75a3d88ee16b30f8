"""The private interfaces of Ray 2.60 that are used: what each is for, and what would happen without it.

No other module imports them. `refuse_other_ray` checks, when a job starts, whether all of them exist and have the
attributes that are used. Each is imported when it is first used: a data task needs only a few.
"""

from __future__ import annotations

import importlib
import inspect
import json
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from detr_ray.config import ConfigError

MADE_FOR = "2.60"


@dataclass(frozen=True)
class Internal:
    """A private interface of Ray.

    Attributes:
        module: its module.
        name: its name in the module.
        uses: attributes of a class or an object, or parameters of a function, that are used.
    """

    module: str
    name: str
    uses: tuple[str, ...] = ()


_TRAIN = "ray.train.v2._internal"

INTERNALS = (
    # Callbacks of Ray Train's controller and workers; without them the driver would not know their state.
    Internal(
        f"{_TRAIN}.execution.callback",
        "ControllerCallback",
        (
            "after_controller_start",
            "after_controller_state_update",
            "before_controller_execute_resize_decision",
        ),
    ),
    Internal(f"{_TRAIN}.execution.callback", "WorkerGroupCallback", ("after_worker_group_training_start",)),
    # Kinds of failures; without them, waiting for resources would count as a failure, and a lost node had no name.
    Internal(f"{_TRAIN}.exceptions", "WorkerGroupStartupTimeoutError"),
    Internal(f"{_TRAIN}.exceptions", "WorkerHealthCheckFailedError"),
    # The controller, created here for its handle and its environment; otherwise a hanging one could not be ended.
    Internal(f"{_TRAIN}.execution.controller", "TrainController", ("run", "get_result", "abort")),
    Internal(f"{_TRAIN}.constants", "get_env_vars_to_propagate"),
    Internal("ray.train.torch", "TorchTrainer", ("_create_default_callbacks", "_initialize_and_run_controller")),
    # Callbacks that the trainer removes or adds; otherwise idle processes run, workers change their working directory,
    # and the dashboard does not show the run.
    Internal(f"{_TRAIN}.callbacks", "WorkingDirectorySetupCallback"),
    Internal(f"{_TRAIN}.callbacks.datasets", "DatasetsCallback"),
    Internal(f"{_TRAIN}.callbacks.state_manager", "StateManagerCallback", ("datasets",)),
    # Removed by the trainer: `places` does the same without the dashboard.
    Internal(f"{_TRAIN}.callbacks.placement_group_callback", "PlacementGroupCleanerCallback"),
    # A resource that only the head node has; without it, the actor of `places` could be lost with a node.
    Internal("ray._common.constants", "HEAD_NODE_RESOURCE_NAME"),
    # Tells a worker that its node is drained. The public way, `ray.train.get_preemption_info`, is a barrier over all
    # workers. Without it, workers would not write a checkpoint before their node ends.
    Internal(f"{_TRAIN}.execution.context", "get_train_context"),
    # Callback of Ray Data's scheduling loop; without it, the loop would slow down training in the same process.
    Internal("ray.data._internal.execution.execution_callback", "ExecutionCallback", ("on_execution_step",)),
    # Two actors of Ray Data, one each in a cluster; see `start_data_actors`.
    Internal("ray.data._internal.stats", "get_or_create_stats_actor"),
    Internal(
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "get_or_create_autoscaling_coordinator",
    ),
    # The cluster's state; see the functions below.
    Internal(
        "ray._private.state",
        "state",
        ("get_draining_nodes", "available_resources_per_node", "actor_table", "_connect_and_get_accessor"),
    ),
    Internal("ray.core.generated.gcs_pb2", "PlacementGroupTableData", ("FromString", "PlacementGroupState")),
    # Whether an autoscaler is running; see `autoscaler_adds_nodes`.
    Internal("ray.autoscaler.v2.utils", "is_autoscaler_v2", ("fetch_from_server",)),
    Internal("ray._private.ray_constants", "DEBUG_AUTOSCALING_STATUS"),
    Internal("ray.experimental.internal_kv", "_internal_kv_get"),
)
_MODULES = {internal.name: internal.module for internal in INTERNALS}


def __getattr__(name: str) -> Any:
    """Imports one of `INTERNALS` when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except (ImportError, AttributeError):
        refuse_other_ray()
        raise


def refuse_other_ray() -> None:
    """Checks whether all of these interfaces exist.

    Raises:
        ConfigError: one is missing, or lacks an attribute or parameter that is used.
    """
    missing = [f"{internal.module}.{internal.name}" for internal in INTERNALS if not _is_there(internal)]
    if missing:
        raise ConfigError(
            f"Ray {ray.__version__} is not the one that this version was made for, {MADE_FOR}: it has other internals "
            f"({', '.join(missing)}); install ray=={MADE_FOR}.*"
        )


def _is_there(internal: Internal) -> bool:
    try:
        found = getattr(importlib.import_module(internal.module), internal.name)
    except (ImportError, AttributeError):
        return False
    parameters: Any = {}
    if inspect.isfunction(found) or internal.name == "StateManagerCallback":
        parameters = inspect.signature(found).parameters
    return all(name in parameters or hasattr(found, name) for name in internal.uses)


def runs_inside_ray() -> bool:
    """Whether this process runs a task or an actor of Ray. The public functions log a warning in other processes."""
    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def node_is_taken_away() -> bool:
    """Whether Ray Train has told this worker that a node of its group is drained."""
    preemption: Any = __getattr__("get_train_context")().preemption_context
    return preemption.preemption_info is not None


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to end. Without it, their resources would be counted as available."""
    return set(__getattr__("state").get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Node id -> its free resources. The public interface has only the sum over all nodes."""
    return __getattr__("state").available_resources_per_node()


def id_of(actor: ActorHandle) -> str:
    """An actor's id in hexadecimal, from its handle. By public means, only the actor itself can ask for it."""
    found: str = actor._actor_id.hex()
    return found


def actor_is_alive(actor_id: str) -> bool:
    """Whether an actor lives. The public State API needs the dashboard, which not every Ray has."""
    return __getattr__("state").actor_table(actor_id).get("State") not in (None, "DEAD")


def placement_groups_of(actor_id: str) -> dict[bytes, str]:
    """The placement groups that an actor has made and that are not removed: id -> state.

    The public interface does not tell which actor made a group. Groups stay after the death of this actor: without
    this, the resources of workers would stay reserved after the death of Ray Train's controller.
    """
    table = __getattr__("PlacementGroupTableData")
    found = {}
    for record in __getattr__("state")._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(record)
        name = table.PlacementGroupState.Name(group.state)
        if group.creator_actor_id.hex() == actor_id and name != "REMOVED":
            found[group.placement_group_id] = name
    return found


def remove_placement_group(group_id: bytes) -> None:
    """Removes one of `placement_groups_of`, and ends the processes in it."""
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))


def autoscaler_adds_nodes(within_s: float = 0.0) -> bool:
    """Whether the cluster has an autoscaler. Without it, requests for resources of new nodes could not wait.

    Ray's monitor writes a report every five seconds, which `ray status` shows. Without an autoscaler, it gives each
    node the type ``node_`` and its id. The newer autoscaler writes no report; its nodes have their type as a label.

    Args:
        within_s: how long to wait for the first report of a cluster that has just been started.
    """
    if __getattr__("is_autoscaler_v2")(fetch_from_server=True):
        return any(node["Labels"].get("ray.io/node-group") for node in ray.nodes() if node["Alive"])
    read, key = __getattr__("_internal_kv_get"), __getattr__("DEBUG_AUTOSCALING_STATUS")
    give_up = time.monotonic() + within_s
    while not (report := read(key)) and time.monotonic() < give_up:
        time.sleep(0.2)
    found = json.loads(report).get("autoscaler_report") if report else None
    return any(not name.startswith("node_") for name in (found or {}).get("active_nodes") or {})


def start_data_actors() -> None:
    """Starts the two actors that Ray Data has in each cluster, if they do not exist.

    They stay after the job, on the node of the process that first needs them. On a training node, they would keep the
    autoscaler from ever removing it. Waiting for them has a time limit.
    """
    __getattr__("get_or_create_stats_actor")()
    __getattr__("get_or_create_autoscaling_coordinator")()
