"""What is hooked into Ray Train's controller: its state goes to the board, and workers leave before a resize."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback

logger = logging.getLogger(__name__)

LEAVE_WITHIN_S = 300.0


class BoardCallback(ControllerCallback):  # type: ignore[misc]
    """Runs in the controller's process.

    Ray Train changes the number of workers by ending them and starting others. Before it does, this has them take their
    step to its end and write a checkpoint, so that nothing is computed twice.

    Args:
        board: the job's board.
    """

    def __init__(self, board: ActorHandle) -> None:
        self._board = board
        self._resizes = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Puts the controller up, so that the driver can end it."""
        self._board.note_controller.remote([ray.get_runtime_context().current_actor])

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Puts the state up, and what failed where that is its reason."""
        state = current_state._state_type.name
        self._resizes = previous_state._state_type.name == "RESIZING"
        error = None
        if state in ("RESTARTING", "RESCHEDULING"):
            error = current_state.training_failed_error
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                error = None  # it goes on waiting for resources, and the driver says so
        self._board.note_state.remote(state, "" if error is None else describe_failure(error))

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Asks running workers to leave, and waits until they have."""
        if not self._resizes:
            return
        self._board.say.remote(f"starting the workers again, {resize_decision.num_workers} of them")
        ray.get(self._board.ask_to_leave.remote("resized"))
        give_up = time.monotonic() + LEAVE_WITHIN_S
        while not ray.get(self._board.everyone_left.remote()) and time.monotonic() < give_up:
            time.sleep(0.2)
        ray.get([self._board.ask_to_leave.remote(None, instead_of="resized"), self._board.forget_workers.remote()])


def describe_failure(error: Exception) -> str:
    """What a failure of Ray Train's means to a user: a line for each worker, its own error."""
    failures = getattr(error, "worker_failures", None) or {}
    if failures:
        return "; ".join(f"rank {rank}: {_cause(failure)}" for rank, failure in sorted(failures.items()))
    return _cause(getattr(error, "controller_failure", None) or error)


def _cause(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, ray.exceptions.RayActorError):
        lost = "node" in text and ("died" in text or "dead" in text or "preempted" in text)
        died = "its node was lost" if lost and "The node" in text else "its process died"
        return f"{died} ({first_sentence(text)})"
    if "onnection reset by peer" in text or "onnection closed by peer" in text:
        return f"it lost another worker ({type(error).__name__}: {first_sentence(text)})"
    return f"{type(error).__name__}: {first_sentence(text)}" if text else type(error).__name__


def first_sentence(text: str) -> str:
    """The beginning of a long error message, on one line."""
    line = " ".join(text.split("\n")[0].split())
    return line if len(line) <= 200 else f"{line[:197]}..."
