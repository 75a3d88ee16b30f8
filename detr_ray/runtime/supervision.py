"""The driver's watch over a job: shows progress, passes on the wish to stop, finds workers that hang or never start."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import ray
from ray.actor import ActorHandle

from detr_ray.config import TrainConfig
from detr_ray.engine.context import Phase
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import Say
from detr_ray.engine.progress import duration
from detr_ray.runtime.board import Beat, News, unpacked

POLL_S = 0.5
WAITING_NOTE_S = 30.0
ABORT_S = 30.0
_PHASES = get_args(Phase)


class StopSignals:
    """What Ctrl-C and termination have asked for so far; see `stop_signals`."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def asked(self) -> bool:
        """Whether the job is to stop after its step."""
        return self._asked.is_set()

    def receive(self, number: int, frame: types.FrameType | None) -> None:
        """The first one asks; the second one does not wait any longer."""
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turns the first Ctrl-C or termination into a request to stop after the step, with a checkpoint.

    Outside of the main thread, where signals cannot be received, nobody asks.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Watches over a job's workers from the driver.

    Args:
        board: the job's board.
        limits: the ``train`` section, for its time limits.
        missing: says what the workers need and what there is.
        say: shows the user a line.
    """

    def __init__(self, board: ActorHandle, limits: TrainConfig, missing: Callable[[], str], say: Say) -> None:
        self._board = board
        self._limits = limits
        self._missing = missing
        self._say = say
        self._told_to_leave = False
        self._waiting_noted_s = 0.0
        self._num_failures = 0
        self._ending = False
        self._processes: set[tuple[str, int]] = set()
        self.stalls: list[str] = []

    def watch(self, job: threading.Thread, signals: StopSignals) -> None:
        """Watches until the job's thread ends.

        Raises:
            KeyboardInterrupt: asked to stop, and no worker is there that could write a checkpoint.
            RunFailed: the workers' resources did not come in time.
        """
        while job.is_alive():
            job.join(POLL_S)
            news = self._show()
            if signals.asked():
                self._stop(news)
            if news.running:
                self._show_places(news.beats)
                self._look_for_stalls(news.beats)
            else:
                self._wait_for_workers(news.since_s)
        self._show()

    def abort(self, job: threading.Thread) -> None:
        """Ends the job's controller, and with it the workers."""
        with contextlib.suppress(ray.exceptions.RayError):  # it ends by exiting, which the caller gets as an error
            controller = ray.get(self._board.controller.remote(), timeout=ABORT_S)
            if controller is not None:
                ray.get(unpacked(controller).abort.remote(), timeout=ABORT_S)
        job.join(ABORT_S)

    def _show(self) -> News:
        news: News = ray.get(self._board.news.remote())
        for line in news.lines:
            self._say(line)
        for failure in news.failures:
            self._num_failures += 1
            self._ending = False
            limit = self._limits.max_failures
            of = "" if limit < 0 else f" of at most {limit}"
            self._say(f"{failure}; starting the workers again (restart {self._num_failures}{of})")
        return news

    def _show_places(self, beats: Mapping[int, Beat]) -> None:
        """Says once for each group of workers where they are."""
        processes = {(beat.node, beat.process) for beat in beats.values()}
        if beats and len(beats) == next(iter(beats.values())).world_size and processes != self._processes:
            self._processes = processes
            self._say(f"at work: {places(beats)}")

    def _stop(self, news: News) -> None:
        if not news.beats:
            self._say("stopped before the workers had begun")
            raise KeyboardInterrupt
        if not self._told_to_leave:
            self._told_to_leave = True
            ray.get(self._board.ask_to_leave.remote("asked"))
            self._say("stopping after this step, with a checkpoint (again: at once, without)")

    def _look_for_stalls(self, beats: Mapping[int, Beat]) -> None:
        if self._ending:
            return  # the others wait for those that were ended, until Ray Train ends them too
        for beat in hanging_workers(beats, self._limits.stall_timeout_s):
            found = (
                f"rank {beat.rank} hangs: {_described(beat, beats)} (train.stall_timeout_s="
                f"{self._limits.stall_timeout_s}; process {beat.process} on {beat.node})"
            )
            self.stalls.append(found)
            self._say(f"{found}; it is ended")
            self._ending = True
            worker = ray.get(self._board.worker.remote(beat.rank))
            if worker is not None:
                ray.kill(unpacked(worker), no_restart=True)

    def _wait_for_workers(self, seconds: float) -> None:
        if seconds < self._waiting_noted_s:
            self._waiting_noted_s = 0.0
        if seconds > self._limits.start_timeout_s:
            raise RunFailed(
                f"the workers could not be started within train.start_timeout_s={self._limits.start_timeout_s}: "
                f"{self._missing()}"
            )
        if seconds > self._waiting_noted_s + WAITING_NOTE_S:
            self._waiting_noted_s = seconds
            missing = self._missing() or "there is room for them now"
            self._say(f"waiting for workers for {duration(seconds)}: {missing}")


def hanging_workers(beats: Mapping[int, Beat], limit_s: float) -> list[Beat]:
    """The workers that the others wait for, if it has been too long.

    At any time most workers of a group with one that hangs wait for it in a sum or an exchange of gradients. The one
    that hangs is furthest behind; several are where they are equally far.
    """
    if not beats:
        return []
    behind = min((beat.step, _PHASES.index(beat.phase)) for beat in beats.values())
    last = [beat for beat in beats.values() if (beat.step, _PHASES.index(beat.phase)) == behind]
    return [beat for beat in last if beat.seconds > limit_s and beat.phase != "leaving"]


def places(beats: Mapping[int, Beat]) -> str:
    """Which ranks are on which node, as in ``rank 0 on 10.0.0.1; ranks 1, 2 on 10.0.0.2``."""
    ranks: dict[str, list[str]] = {}
    for rank, beat in sorted(beats.items()):
        ranks.setdefault(beat.node, []).append(str(rank))
    parts = (f"rank{'s' if len(on) > 1 else ''} {', '.join(on)} on {node}" for node, on in ranks.items())
    return "; ".join(parts)


def _described(beat: Beat, beats: Mapping[int, Beat]) -> str:
    doing = f"{beat.phase} at step {beat.step}"
    if beat.silent_s < beat.seconds / 2:
        return f"{doing} for {duration(beat.seconds)}"
    others = ", ".join(sorted({f"{other.phase} at step {other.step}" for other in beats.values() if other != beat}))
    return f"nothing heard of it for {duration(beat.silent_s)}, last {doing}; the others: {others or 'none'}"


def run_in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any], list[BaseException]]:
    """Starts work beside the main thread, which stays free for signals: the thread, its result, its error."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again by who started it
            errors.append(error)

    thread = threading.Thread(target=run, name="job", daemon=True)
    thread.start()
    return thread, results, errors
