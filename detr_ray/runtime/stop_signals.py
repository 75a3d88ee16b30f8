"""Ctrl-C and termination as a request to stop after the step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator


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

    What the process did about these signals before, it does again afterwards. Outside of the main thread, where signals
    cannot be received, nobody asks.
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
            # A handler that was not set from Python cannot be set from there again; the default is the nearest to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
