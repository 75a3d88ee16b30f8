"""Removes the placement groups of workers whose controller has died, in a Ray that is shared with other programs.

Ray keeps a placement group after the death of the actor that made it. Ray Train has an actor for this, too, but it
needs the dashboard, which not every Ray has, checks only once, and imports all of Ray Train (see `ray_internals`).
"""

from __future__ import annotations

import logging
import threading
import time

import ray

from detr_ray.runtime.job_status import NAMESPACE
from detr_ray.runtime.ray_internals import (
    HEAD_NODE_RESOURCE_NAME,
    actor_is_alive,
    placement_groups_of,
    remove_placement_group,
)

logger = logging.getLogger(__name__)

LOOK_S = 1.0


class PlacesOfDead:
    """The actor. It ends when the controller has died and has no placement groups any more.

    Args:
        controller_id: of Ray Train's controller, in hexadecimal.
    """

    def __init__(self, controller_id: str) -> None:
        self._controller_id = controller_id
        threading.Thread(target=self._watch, args=(ray.get_runtime_context().current_actor,), daemon=True).start()

    def _watch(self, this: ray.actor.ActorHandle) -> None:
        while not self._is_over():
            time.sleep(LOOK_S)
        ray.kill(this)

    def _is_over(self) -> bool:
        """Removes the placement groups of a dead controller; returns whether none was left."""
        try:
            return not actor_is_alive(self._controller_id) and free_places(self._controller_id)
        except Exception:  # Ray's head is busy or unreachable: try again
            logger.exception("the places of controller %s are not free yet", self._controller_id)
            return False


def free_places(controller_id: str) -> bool:
    """Removes the placement groups of a controller; returns whether none was left. Ray needs a moment for each."""
    groups = placement_groups_of(controller_id)
    for group in groups:
        remove_placement_group(group)
    return not groups


def free_places_after_death() -> None:
    """Called in a controller: starts the actor that removes its placement groups after its death."""
    controller_id = ray.get_runtime_context().get_actor_id()
    # Detached, and on the head node, so that it survives the controller, its owner and their nodes.
    ray.remote(num_cpus=0, max_restarts=-1)(PlacesOfDead).options(
        name=f"places of {controller_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        resources={HEAD_NODE_RESOURCE_NAME: 0.001},
    ).remote(controller_id)
