"""A call of the library leaves the process that it is called from as it was: a notebook, a service, a test."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

_Logger = tuple[int, bool, bool, list[logging.Handler]]


@contextlib.contextmanager
def host_process_as_before() -> Iterator[None]:
    """Sets back, also after an error, what Ray, torch and their imports change for the whole process.

    That is the environment, the working directory, handlers of signals (in the main thread, where Python allows it),
    levels and handlers of loggers, filters of warnings, torch's threads, and the random numbers of Python, numpy and
    torch.

    All of it is one for the process: other threads see the changes while the call lasts, and what they change
    themselves meanwhile is set back too. Calls that need an environment of their own belong in processes of their own.
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
        # None is a handler that was not set from Python, and cannot be set from there again.
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
    """Threads, state of the random numbers, and that of GPUs which are in use; None where torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):  # another thread may just be importing it
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
