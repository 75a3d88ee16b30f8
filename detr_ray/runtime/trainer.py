"""One start of Ray Train: its controller with our callbacks, a thread that waits for it, and ending both."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from detr_ray.engine.errors import RunFailed
from detr_ray.runtime.cluster_address import cluster_address
from detr_ray.runtime.heartbeat import ControllerHeartbeat
from detr_ray.runtime.job_status import Member, unpacked
from detr_ray.runtime.places import free_places, free_places_after_death
from detr_ray.runtime.ray_internals import (
    ControllerCallback,
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    StateManagerCallback,
    TrainController,
    WorkerGroupCallback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkingDirectorySetupCallback,
    get_env_vars_to_propagate,
    id_of,
    placement_groups_of,
    runs_inside_ray,
)

logger = logging.getLogger(__name__)

ABORT_WITHIN_S = 10.0
ENDED_WITHIN_S = 30.0
LEAVE_WITHIN_S = 300.0
_MOST_TEXT = 300


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer, with access to its controller.

    Both overridden methods are internal, see `ray_internals`. Without the first one, idle processes run, and workers
    change their working directory. Without the second one, a controller that hangs before its first heartbeat could not
    be ended, and it would have this process's environment.

    Args:
        environment: environment variables of the controller and the workers; this process's own take precedence.
        own_ray: whether Ray was started for this job alone. It then ends with this process, and no other program waits
            for the workers' resources.
        keep_state: whether Ray Train keeps the run's state for the dashboard.
        arguments: see ``TorchTrainer``.
    """

    def __init__(
        self, *arguments: Any, environment: dict[str, str], own_ray: bool, keep_state: bool, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._environment = environment
        self._own_ray = own_ray
        self._keep_state = keep_state
        self.controller: ActorHandle | None = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if not self._own_ray:
            callbacks.append(FreePlacesCallback())
        if self._keep_state and not any(isinstance(callback, StateManagerCallback) for callback in callbacks):
            callbacks.append(StateManagerCallback(datasets=self.datasets))
        # Workers get their data from `datasets`, not from the trainer.
        idle = (WorkingDirectorySetupCallback, PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in callbacks if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": controller_environment(self._environment)}
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": environment}
        self.controller = ray.remote(**options)(TrainController).remote(**controller)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


def controller_environment(defaults: dict[str, str]) -> dict[str, str]:
    """Environment variables for the controller in addition to the job's; the workers get them from it.

    Args:
        defaults: values of variables that are not set in this process's environment.
    """
    return {**defaults, "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}


class ControllerLost(RuntimeError):  # noqa: N818 - it names what happened
    """The controller's process has died, and so have the workers."""


class Attempt:
    """A trainer that runs in a thread, so that the main thread can handle signals.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._results: list[Any] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._trainer.fit().return_value)
        except BaseException as error:  # raised again by `result`
            self._errors.append(error)

    def wait(self, seconds: float) -> bool:
        """Waits up to ``seconds``; returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """The return value of rank 0.

        Raises:
            ControllerLost: the controller's process died.
            Exception: what Ray Train raised.
        """
        if not self._errors:
            return self._results[0]
        error = self._errors[0]
        if isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed:
            raise ControllerLost from error
        raise error

    def has_place(self) -> bool:
        """Whether resources are reserved for its workers."""
        controller = self._trainer.controller
        return controller is not None and "CREATED" in placement_groups_of(id_of(controller)).values()

    def abort(self) -> None:
        """Asks the controller to end with its workers, then kills it and removes its placement groups."""
        controller = self._trainer.controller
        if controller is not None:
            # A controller exits, which is an error for the caller; a hanging one does not answer at all.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=ABORT_WITHIN_S)
        self.end([])

    def end(self, workers: Iterable[Member]) -> None:
        """Kills the controller and its workers, and removes their placement groups.

        Args:
            workers: of the controller.

        Raises:
            RunFailed: Ray does not end the controller.
        """
        give_up = time.monotonic() + ENDED_WITHIN_S
        while self._trainer.controller is None and time.monotonic() < give_up and not self.wait(0.1):
            pass  # it is still being created
        controller = self._trainer.controller
        if controller is not None:
            ray.kill(controller)
            self._free_places(controller, workers)
        if not self.wait(ENDED_WITHIN_S):
            raise RunFailed(f"Ray did not end the controller within {ENDED_WITHIN_S:.0f} s; Ray itself hangs")

    def _free_places(self, controller: ActorHandle, workers: Iterable[Member]) -> None:
        for worker in workers:
            ray.kill(unpacked(worker.actor))
        give_up = time.monotonic() + ENDED_WITHIN_S
        while not free_places(id_of(controller)) and time.monotonic() < give_up:
            time.sleep(0.2)


def threads_given() -> int | None:
    """Number of torch threads set by the user (``OMP_NUM_THREADS``); None in jobs and actors, where Ray sets it."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and cluster_address() is None and not runs_inside_ray() else None


class FreePlacesCallback(ControllerCallback):  # type: ignore[misc]
    """Removes the placement groups after the controller's death; replaces Ray Train's callback, see `places`."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Starts to watch the controller."""
        free_places_after_death()


class StatusCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callbacks in the controller's process.

    Ray Train changes the number of workers by ending them and starting others. Before that, this lets the workers
    finish their step and write a checkpoint, so that nothing is computed twice.

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
        """Starts the heartbeat."""
        self._heartbeat = ControllerHeartbeat(self._status, self._attempt)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Notes the state, and the failure that caused it, if any. Called in each round of the controller's loop."""
        assert self._heartbeat is not None, "the controller has started"
        state = current_state._state_type.name
        self._resizes = previous_state._state_type.name == "RESIZING"
        error = None
        if state in ("RESTARTING", "RESCHEDULING") and state != previous_state._state_type.name:
            error = current_state.training_failed_error
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                error = None  # it only waits for resources, which the driver reports
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
        self._heartbeat.flush()  # the next workers are not to leave


def describe_failure(error: Exception) -> str:
    """A failure of Ray Train as text for users: the errors of workers, without errors that another worker caused."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return _cause(getattr(error, "controller_failure", None) or error)
    culprits = {rank: failure for rank, failure in failures.items() if not _lost_another(failure)}
    return "; ".join(f"rank {rank}: {_cause(failure)}" for rank, failure in sorted((culprits or failures).items()))


def _lost_another(error: Exception) -> bool:
    """Whether a worker failed only because its connection to another worker broke."""
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
