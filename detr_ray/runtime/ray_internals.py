"""What is used of Ray 2.60 that Ray does not promise: each with what it is for, and what happens without it.

Three modules derive classes from internal ones and import them themselves: ``controller_callback`` (Ray Train's
callbacks of the controller and the worker group; without them the driver would not know what the controller does),
``trainer`` (how the trainer starts its controller) and ``datasets`` (Ray Data's callback of an execution; without it
scheduling takes the interpreter from training). ``autoscaler`` reads what autoscalers were started with.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle


def node_is_taken_away() -> bool:
    """Whether Ray Train has told this worker that a node of its group drains.

    The public way to ask, `ray.train.get_preemption_info`, is a barrier over all workers. Without it workers would not
    leave with a checkpoint before their node goes.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    preemption: Any = get_train_context().preemption_context
    return preemption.preemption_info is not None


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to leave. Without it room would be counted that is gone when it is used."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Node id -> what nothing uses of its resources; public is only their sum over all nodes."""
    from ray._private.state import state

    return state.available_resources_per_node()


def placement_groups_of(creator: ActorHandle) -> dict[bytes, str]:
    """The placement groups that an actor has made and that are not removed: id -> state.

    Public are only placement groups without their creator. A group outlives the actor that made it: without this, the
    workers' places would stay taken when Ray Train's controller has died.
    """
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    found = {}
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        name = gcs_pb2.PlacementGroupTableData.PlacementGroupState.Name(group.state)
        if group.creator_actor_id == creator._actor_id.binary() and name != "REMOVED":
            found[group.placement_group_id] = name
    return found


def remove_placement_group(group_id: bytes) -> None:
    """Removes one of `placement_groups_of`, and ends what runs in it."""
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))


def start_data_actors() -> None:
    """Starts the two actors that Ray Data has in each cluster, if they are not there.

    They outlive the job, on the node of who asks for them first: on a training node they would keep the autoscaler from
    ever taking that node away. Nothing waits for either without a limit.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
