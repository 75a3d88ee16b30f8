"""The process that calls the library: its settings are restored, and its signals to stop are handled.

It may be a command, a notebook, a service, an actor of Ray, or a thread in any of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from detr_ray.runtime.ray_internals import runs_inside_ray

_Logger = tuple[int, bool, bool, list[logging.Handler]]


@contextlib.contextmanager
def host_process_as_before() -> Iterator[None]:
    """Restores, also after an error, what Ray, torch and their imports change for the whole process.

    That is the environment, the working directory, signal handlers (in the main thread, where Python allows it), levels
    and handlers of loggers, filters of warnings, torch's threads, and the random states of Python, numpy and torch.
    Other threads see the changes during the call, and their own changes to these settings meanwhile are undone, too.
    Calls that need different settings should run in different processes.
    """
    environment, folder = dict(os.environ), _working_directory()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    loggers = {name: _settings(logger) for name, logger in _loggers()}
    random_before = random.getstate(), np.random.get_state()
    torch_before = _torch_state()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            _restore_environment(environment)
            if folder is not None and folder != _working_directory():
                os.chdir(folder)
            _restore_signals(handlers)
            _restore_loggers(loggers)
            random.setstate(random_before[0])
            np.random.set_state(random_before[1])
            _restore_torch(torch_before)


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - as the system has it
    except FileNotFoundError:
        return None


def _restore_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _restore_signals(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, handler in handlers.items():
        # None: the handler was not set from Python, so Python cannot restore it.
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _loggers() -> list[tuple[str, logging.Logger]]:
    named = logging.Logger.manager.loggerDict.items()
    return [("", logging.root), *((name, one) for name, one in list(named) if isinstance(one, logging.Logger))]


def _settings(logger: logging.Logger) -> _Logger:
    return logger.level, logger.propagate, logger.disabled, list(logger.handlers)


def _restore_loggers(before: dict[str, _Logger]) -> None:
    for name, logger in _loggers():
        if name in before and _settings(logger) != before[name]:
            level, logger.propagate, logger.disabled, logger.handlers[:] = before[name]
            logger.setLevel(level)


def _torch_state() -> tuple[int, Any, list[Any]] | None:
    """Number of threads, random state, and that of GPUs in use; None if torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):  # another thread may be importing it now
        return None
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_num_threads(), torch.get_rng_state(), gpus


def _restore_torch(before: tuple[int, Any, list[Any]] | None) -> None:
    if before is None:
        return
    import torch

    threads, state, gpus = before
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_rng_state(state)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)


class StoppedBeforeWork(Exception):  # noqa: N818 - it names what happened
    """The program that runs the job stopped it before a worker had begun."""


class StopSignals:
    """Whether a job is to stop: because of Ctrl-C, SIGTERM, or the program that runs it.

    Args:
        should_stop: asks that program; not called again after it returned true.
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
        """Ends a job that is to stop before its first step.

        Raises:
            KeyboardInterrupt: it was stopped by a signal.
            StoppedBeforeWork: it was stopped by the program that runs it.
        """
        raise KeyboardInterrupt if self._signalled.is_set() else StoppedBeforeWork

    def receive(self, number: int, frame: types.FrameType | None) -> None:
        """Handles a signal: the first one asks to stop, the second one ends the job at once."""
        if self._signalled.is_set():
            raise KeyboardInterrupt
        self._signalled.set()


@contextlib.contextmanager
def stop_signals(should_stop: Callable[[], bool] = lambda: False) -> Iterator[StopSignals]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step, with a checkpoint.

    The former handlers are restored at the end. Handlers are not changed outside of the main thread, where Python does
    not allow it, and in tasks and actors of Ray, which uses these signals itself.

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
            # A handler that was not set from Python cannot be restored; the default is closest to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
