"""Messages between the driver of a search and its running trials, beside the results.

A small actor keeps them. The driver sends its complete state each second, so the actor can be restarted at any time.
Trials query it twice a second.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from detr_ray.callbacks import Say

logger = logging.getLogger(__name__)

ASK_S = 0.5
ANSWER_WITHIN_S = 5.0
MOST_LINES = 1000
MOST_UNANSWERED = 3

# The driver restarts the actor within seconds. A trial that cannot reach it for this long has lost its driver.
ORPHANED_S = 120.0


@dataclasses.dataclass(frozen=True)
class Order:
    """An order to a trial: to continue from another checkpoint, with other settings.

    Attributes:
        generation: the number of the trial's moves, including this one.
        values: its new settings.
        checkpoint: the checkpoint to continue from.
    """

    generation: int
    values: Mapping[str, Any]
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Directions:
    """The driver's state for all trials.

    Attributes:
        stopping: whether all trials are to stop, with a checkpoint.
        decided_epoch: epoch of the population's last decided round; a trial may not end before the last round is
            decided.
        orders: the last order of each trial that has one.
    """

    stopping: bool = False
    decided_epoch: int = 0
    orders: Mapping[str, Order] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a trial reports beside its results.

    Attributes:
        share: how much of its training is done, 0..1.
        moved: generation -> seconds from the order to the first step after it.
    """

    share: float = 0.0
    moved: Mapping[int, float] = dataclasses.field(default_factory=dict)


class SearchControl:
    """The actor."""

    def __init__(self) -> None:
        self._directions = Directions()
        self._progress: dict[str, Progress] = {}
        self._lines: list[str] = []

    def direct(self, directions: Directions) -> tuple[dict[str, Progress], list[str]]:
        """The driver's call: takes its state; returns the progress of the trials and new lines."""
        self._directions = directions
        lines, self._lines = self._lines, []
        return self._progress, lines

    def ask(self, trial: str, progress: Progress) -> tuple[bool, int, Order | None]:
        """A trial's call: returns whether it is to stop, the last decided round, and its last order."""
        self._progress[trial] = progress
        directions = self._directions
        return directions.stopping, directions.decided_epoch, directions.orders.get(trial)

    def say(self, line: str) -> None:
        """Takes a line for the user."""
        if len(self._lines) < MOST_LINES:
            self._lines.append(line)


def start_control() -> ActorHandle:
    """Starts the actor, beside the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(SearchControl).remote()


class Line:
    """A trial's connection to the driver: a thread that queries the actor.

    Args:
        control: the actor.
        trial: name of the trial.

    Attributes:
        stopping: whether the trial is to stop.
        decided_epoch: epoch of the last decided round.
        order: the trial's last order.
        share: what is told of how much of the training is done.
    """

    def __init__(self, control: ActorHandle, trial: str) -> None:
        self._control = control
        self._trial = trial
        self.stopping = False
        self.decided_epoch = 0
        self.order: Order | None = None
        self.share = 0.0
        self._moved: dict[int, float] = {}
        self._ended = threading.Event()
        self._heard = time.monotonic()
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def say(self, line: str) -> None:
        """Shows the user of the search a line."""
        self._control.say.remote(f"{self._trial}: {line}")

    def moved(self, generation: int, seconds: float) -> None:
        """Reports the time that an order took."""
        self._moved = {**self._moved, generation: seconds}

    def end(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(ASK_S):
            progress = Progress(self.share, self._moved)
            try:
                answer = ray.get(self._control.ask.remote(self._trial, progress), timeout=ANSWER_WITHIN_S)
            except ray.exceptions.RayError as error:
                logger.info("the search's control is not reached: %s", error)
                self.stopping = self.stopping or time.monotonic() - self._heard > ORPHANED_S
                continue
            self.stopping, self.decided_epoch, self.order = answer
            self._heard = time.monotonic()


class Control:
    """The driver's side: sends its state and receives reports of trials.

    Args:
        say: shows the user a line.

    Attributes:
        actor: the actor.
        directions: the state; it is sent after it was set.
        progress: the last report of each trial.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self.actor = start_control()
        self.directions = Directions()
        self.progress: dict[str, Progress] = {}
        self._sent_at = 0.0
        self._unanswered = 0

    def exchange(self, *, at_once: bool = False) -> None:
        """Sends the state, if a second has passed since the last time, or with ``at_once``."""
        if not at_once and time.monotonic() - self._sent_at < 1:
            return
        self._sent_at = time.monotonic()
        try:
            told = ray.get(self.actor.direct.remote(self.directions), timeout=ANSWER_WITHIN_S)
        except ray.exceptions.RayError as error:
            logger.info("the search's control does not answer: %s", error)
            self._unanswered += 1
            if self._unanswered % MOST_UNANSWERED == 0:
                ray.kill(self.actor, no_restart=False)  # it hangs; Ray restarts it
            return
        self._unanswered = 0
        self.progress, lines = told
        for line in lines:
            self._say(line)

    def stop(self) -> None:
        """Lets all trials stop, with a checkpoint."""
        self.directions = dataclasses.replace(self.directions, stopping=True)
        self.exchange(at_once=True)

    def order(self, decided_epoch: int, orders: Mapping[str, Order]) -> None:
        """Gives orders, and sets the last decided round."""
        self.directions = dataclasses.replace(self.directions, decided_epoch=decided_epoch, orders=dict(orders))
        self.exchange(at_once=True)

    def end(self) -> None:
        """Ends the actor."""
        ray.kill(self.actor, no_restart=True)
