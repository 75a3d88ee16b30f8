"""Ctrl-C and termination as a request to stop after the step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import NoReturn

from detr_ray.runtime.ray_internals import runs_inside_ray


class StoppedBeforeWork(Exception):  # noqa: N818 - it names what happened
    """The program that runs the job has stopped it before a worker had begun."""


class StopSignals:
    """Whether a job is to stop: because of Ctrl-C or termination, or because the program that runs it says so.

    Args:
        should_stop: asks that program; once it has said yes, it is not asked again.
    """

    def __init__(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._signalled = threading.Event()
        self._should_stop = should_stop
        self._told = False

    def asked(self) -> bool:
        """Whether the job is to stop after its step."""
        self._told = self._told or self._should_stop()
        return self._told or self._signalled.is_set()

    def interrupt(self) -> NoReturn:
        """Ends a job that is to stop, and has no step to stop after.

        Raises:
            KeyboardInterrupt: it was a signal.
            StoppedBeforeWork: it was the program that runs the job.
        """
        raise KeyboardInterrupt if self._signalled.is_set() else StoppedBeforeWork

    def receive(self, number: int, frame: types.FrameType | None) -> None:
        """The first signal asks to stop; the second one ends the job at once."""
        if self._signalled.is_set():
            raise KeyboardInterrupt
        self._signalled.set()


@contextlib.contextmanager
def stop_signals(should_stop: Callable[[], bool] = lambda: False) -> Iterator[StopSignals]:
    """Turns the first Ctrl-C or termination into a request to stop after the step, with a checkpoint.

    Afterwards the process handles these signals as before. Signals stay as they are outside of the main thread, where
    Python does not let them be handled, and in tasks and actors of Ray, which has its own use for them.

    Args:
        should_stop: another source of such a request.
    """
    signals = StopSignals(should_stop)
    if threading.current_thread() is not threading.main_thread() or runs_inside_ray():
        yield signals
        return
    before = {number: signal.signal(number, signals.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            # A handler that was not set from Python cannot be set from there again; the default is the nearest to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
