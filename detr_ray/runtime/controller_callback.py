"""What is hooked into Ray Train's controller: its heartbeat, and workers that leave before a resize."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle

from detr_ray.runtime.heartbeat import ControllerHeartbeat
from detr_ray.runtime.ray_internals import (
    ControllerCallback,
    WorkerGroupCallback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

LEAVE_WITHIN_S = 300.0
_MOST_TEXT = 300


class StatusCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Runs in the controller's process.

    Ray Train changes the number of workers by ending them and starting others. Before it does, this has them take their
    step to its end and write a checkpoint, so that nothing is computed twice.

    Args:
        status: keeps the job's status.
        attempt: which start of Ray Train it is.
    """

    def __init__(self, status: ActorHandle, attempt: int) -> None:
        self._status = status
        self._attempt = attempt
        self._heartbeat: ControllerHeartbeat | None = None
        self._resizes = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Begins the heartbeat."""
        self._heartbeat = ControllerHeartbeat(self._status, self._attempt)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Notes the state, and what failed where that is its reason. Each turn of the controller's loop comes here."""
        assert self._heartbeat is not None, "the controller has started"
        state = current_state._state_type.name
        self._resizes = previous_state._state_type.name == "RESIZING"
        error = None
        if state in ("RESTARTING", "RESCHEDULING") and state != previous_state._state_type.name:
            error = current_state.training_failed_error
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                error = None  # it goes on waiting for resources, and the driver says so
        self._heartbeat.enter(state, "" if error is None else describe_failure(error))

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Notes the workers."""
        assert self._heartbeat is not None, "the controller has started"
        self._heartbeat.begin_group(
            {
                worker.distributed_context.world_rank: (worker.metadata.node_ip, worker.metadata.pid, worker.actor)
                for worker in worker_group.get_workers()
            }
        )

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Asks running workers to leave, and waits until they have."""
        if not self._resizes or self._heartbeat is None:
            return
        self._heartbeat.say(f"starting the workers again, {resize_decision.num_workers} of them")
        self._heartbeat.ask_to_leave("resized")
        give_up = time.monotonic() + LEAVE_WITHIN_S
        while not self._heartbeat.everyone_left and time.monotonic() < give_up:
            time.sleep(0.2)
        self._heartbeat.ask_to_leave(None)
        self._heartbeat.flush()  # those that are started next are to stay


def describe_failure(error: Exception) -> str:
    """What a failure of Ray Train's means to a user: each worker's own error, those of the others' victims left out."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return _cause(getattr(error, "controller_failure", None) or error)
    culprits = {rank: failure for rank, failure in failures.items() if not _lost_another(failure)}
    return "; ".join(f"rank {rank}: {_cause(failure)}" for rank, failure in sorted((culprits or failures).items()))


def _lost_another(error: Exception) -> bool:
    """Whether a worker only failed because its connection to another one broke."""
    return any(sign in str(error) for sign in ("onnection reset by peer", "onnection closed by peer"))


def _cause(error: Exception) -> str:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    text = " ".join(str(error).strip().split("\n")[0].split())
    text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."
    if isinstance(error, ray.exceptions.RayActorError):
        return "its node was lost" if "node has died" in str(error) or error.preempted else f"its process died ({text})"
    if _lost_another(error):
        return f"it lost another worker ({text})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
